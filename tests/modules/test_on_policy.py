from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from taught import chats, distillation, save_teacher
from tiny_networks import tiny_gpt2, tiny_llama, tiny_tokenizer
from tiny_run import tiny_batches, tiny_loader, tiny_trainer
from torch import nn

from lightllm.batch import IGNORE_INDEX, Document, TextBatch, pack_documents
from lightllm.callbacks import RandomState
from lightllm.generate import Decoding, generate_ids
from lightllm.losses import Divergence
from lightllm.models import FromModule, LoRA, Pretrained
from lightllm.modules import Distillation, OnPolicy, TeacherCache
from lightllm.modules.on_policy import BatchPrompt, batch_prompts, own_answers


class Watch(Callback):
    """Notes what was trained on, and saves after the fifth batch of a run that is not resumed."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.own: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.weights.append(float(outputs["weight"]))
        self.own.append(float(trainer.callback_metrics["train/on_policy"]))
        if len(self.own) == trainer.global_step == 5:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/fifth.ckpt", weights_only=False)


def fit(module: Distillation, folder: Path, resume: Path | None = None) -> tuple[Trainer, Watch]:
    watch = Watch()
    trainer = tiny_trainer(folder, [watch, RandomState()], max_epochs=3)
    trainer.fit(module, datamodule=chats(folder), ckpt_path=resume, weights_only=True)
    return trainer, watch


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return save_teacher(tmp_path / "teacher")


def packed_batch() -> TextBatch:
    """Two rows: two documents that ask something first, and one that is all targets; padding behind both."""
    asked = [
        Document([5, 6, 7, 8, 9], [False, False, False, True, True], 3),
        Document([11, 12, 13, 14], [False, True, False, True], 8),
    ]
    return pack_documents([asked, [Document([20, 21, 22], [True, True, True], 4)]], length=9, padding_token=1)


def test_prompts_go_up_to_the_first_target() -> None:
    assert batch_prompts(packed_batch()) == [
        BatchPrompt(0, 3, [5, 6, 7]),
        BatchPrompt(0, 8, [11]),
        BatchPrompt(1, 4, [20]),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_networks_own_and_the_only_targets(temperature: float) -> None:
    torch.manual_seed(0)
    network, tokenizer = tiny_llama().train(), tiny_tokenizer()
    torch.manual_seed(3)
    made = own_answers(network, tokenizer, packed_batch(), OnPolicy(1.0, temperature, 6))
    torch.manual_seed(3)
    seed = int(torch.randint(2**31, ()))
    settings = Decoding(temperature=temperature, max_new_tokens=6, seed=seed)
    prompts = [[5, 6, 7], [11], [20]]
    answers = generate_ids(network, tokenizer, prompts, settings)
    assert made is not None
    assert network.training
    places = ((0, 3), (0, 8), (1, 4))
    for (row, document), prompt, answer in zip(places, prompts, answers, strict=True):
        here = made["document_ids"][row] == document
        assert made["input_ids"][row][here].tolist() == [*prompt, *answer][:-1]
        labels = made["labels"][row][here]
        assert labels[labels != IGNORE_INDEX].tolist() == answer
        assert (labels[: len(prompt) - 1] == IGNORE_INDEX).all()
        assert made["position_ids"][row][here].tolist() == list(range(len(prompt) + len(answer) - 1))
    if temperature == 0.0:
        with torch.no_grad():
            logits = network.eval()(torch.tensor([[*prompts[0], *answers[0]][:-1]])).logits[0]
        assert logits[2:].argmax(-1).tolist() == answers[0]


def test_one_number_is_drawn_whatever_is_generated() -> None:
    network, tokenizer = tiny_llama(), tiny_tokenizer()
    states = []
    for settings in (OnPolicy(max_new_tokens=2), OnPolicy(max_new_tokens=9)):
        torch.manual_seed(5)
        own_answers(network, tokenizer, packed_batch(), settings)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_prompts_without_room_are_left_out() -> None:
    torch.manual_seed(0)
    network, tokenizer = tiny_gpt2(), tiny_tokenizer()  # of 96 positions
    long = Document([7] * 97, [False] * 96 + [True], 1)
    batch = pack_documents([[long], [Document([5, 6], [False, True], 2)]])
    made = own_answers(network, tokenizer, batch, OnPolicy(max_new_tokens=4))
    assert made is not None
    assert set(made["document_ids"].flatten().tolist()) == {2}
    assert own_answers(network, tokenizer, pack_documents([[long]]), OnPolicy()) is None


def test_loss_is_the_divergence_on_the_answers(teacher: str, tmp_path: Path) -> None:
    divergence = Divergence("reverse_kl", temperature=2.0)
    module = distillation(teacher, None, divergence=divergence, on_policy=OnPolicy(1.0, 1.0, 5), hard_loss=3.0)
    steps: list[tuple[float, float]] = []

    class Compare(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: TextBatch, index: int) -> None:
            torch.rand(())
            made = own_answers(module.built_network, module.tokenizer, batch, module.on_policy)
            assert made is not None
            targets = made["labels"] != IGNORE_INDEX
            given = {"input_ids": made["input_ids"], "position_ids": made["position_ids"], "use_cache": False}
            with torch.no_grad():
                p, q = (
                    F.log_softmax(one(**given).logits[targets] / 2, -1)
                    for one in (module.built_network, module.built_teacher)
                )
            self.expected = 4 * float((p.exp() * (p - q)).sum())

        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
            steps.append((float(outputs["loss_sum"]), self.expected))

    class Rewind(Callback):
        """Puts the random numbers back to where they were before the batch."""

        def on_train_batch_start(self, *_: Any) -> None:
            torch.set_rng_state(self.state)

    compare, rewind = Compare(), Rewind()

    class Note(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            rewind.state = torch.get_rng_state()

    trainer = tiny_trainer(tmp_path, [Note(), compare, rewind], max_epochs=1)
    trainer.fit(module, datamodule=chats(tmp_path))
    assert len(steps) == 4
    for found, expected in steps:
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_share_of_the_batches_and_none_of_validation(teacher: str, tmp_path: Path) -> None:
    trainer, watch = fit(distillation(teacher, None, on_policy=OnPolicy(0.5, max_new_tokens=4)), tmp_path)
    assert len(watch.own) == 12
    assert 1 < sum(watch.own) < 11
    for weight, own in zip(watch.weights, watch.own, strict=True):
        assert not own or weight <= 3 * 4
    module = trainer.lightning_module
    assert isinstance(module, Distillation)
    data = chats(tmp_path)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.excerpt("val")
    targets = batch["labels"] != IGNORE_INDEX
    with torch.no_grad():
        given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        logits = module.built_network.eval()(**given).logits[targets]  # type: ignore[operator]
    expected = float(F.cross_entropy(logits, batch["labels"][targets]))
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(teacher: str, tmp_path: Path, lora: bool) -> None:
    """With dropout, so that other random numbers than those of the answers count too."""

    def module() -> Distillation:
        made = distillation(teacher, None, on_policy=OnPolicy(0.6, max_new_tokens=6))
        if lora:
            made.plan = made.plan._replace(adapter=LoRA(rank=4, dropout=0.3))
        return made

    whole, again = module(), module()
    _, watch = fit(whole, tmp_path)
    assert {0.0, 1.0} <= set(watch.own[5:])
    _, resumed = fit(again, tmp_path, tmp_path / "fifth.ckpt")
    assert resumed.own == watch.own[5:]
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_it_learns(teacher: str, tmp_path: Path) -> None:
    trainer, _ = fit(distillation(teacher, None, on_policy=OnPolicy(1.0, max_new_tokens=12)), tmp_path)
    begin = tiny_trainer(tmp_path, []).validate(distillation(teacher, None), datamodule=chats(tmp_path), verbose=False)
    assert float(trainer.callback_metrics["val/divergence"]) < begin[0]["val/divergence"]


class Own(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(vocab, 8), nn.Linear(8, vocab, bias=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.embed(input_ids)


def test_what_is_refused(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"on_policy.share is 0: give more than 0"):
        OnPolicy(0)
    with pytest.raises(ValueError, match="max_new_tokens is at least 1"):
        OnPolicy(max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        OnPolicy(temperature=-1.0)
    with pytest.raises(ValueError, match="on_policy: a cached teacher says what it predicts for the data"):
        distillation(teacher, TeacherCache(), on_policy=OnPolicy())
    module = Distillation(FromModule(Own, tokenizer=teacher), teacher=Pretrained(teacher), on_policy=OnPolicy())
    with pytest.raises(ValueError, match="this needs a transformers network"):
        tiny_trainer(tmp_path, []).fit(module, *(tiny_loader(tiny_batches(1)) for _ in range(2)))
