from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from taught import chats, save_teacher
from tiny_networks import TEXT, tiny_llama, tiny_tokenizer
from tiny_run import tiny_batches, tiny_loader, tiny_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.callbacks import StructuredPruning
from lightllm.losses import Divergence
from lightllm.models import BuildRequest, EveryNthLayer, FromConfig, LoRA, Pretrained
from lightllm.modules import Distillation, HiddenStateLoss, RelationLoss, Schedule

VOCAB = 320


def save(network: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    network.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """Folder of a llama of six layers."""
    fields = tiny_llama(VOCAB).config.to_dict() | {"num_hidden_layers": 6}
    return save(LlamaForCausalLM(LlamaConfig(**fields)), tmp_path / "teacher")


def third(teacher: str, **fields: Any) -> Distillation:
    torch.manual_seed(0)
    student = EveryNthLayer(teacher, 3, dtype="float32")
    optimizer = fields.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0))
    return Distillation(
        student,
        teacher=Pretrained(teacher, dtype="float32"),
        optimizer=optimizer,
        schedule=Schedule(shape="constant", warmup=0),
        **fields,
    )


def fit(module: Distillation, folder: Path, steps: int = 2, callbacks: list[Callback] | None = None) -> Trainer:
    trainer = tiny_trainer(folder, callbacks or [], max_steps=steps, max_epochs=-1)
    trainer.fit(module, tiny_loader(tiny_batches(2)), tiny_loader(tiny_batches(2)))
    return trainer


def built(module: Distillation, folder: Path) -> Distillation:
    """The module as it is in a run."""
    fit(module, folder, steps=1)
    return module


def logits(network: nn.Module, batch: TextBatch) -> Tensor:
    targets = batch["labels"] != IGNORE_INDEX
    return network(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[targets]


def test_loss_is_divergence_and_cross_entropy(teacher: str, tmp_path: Path) -> None:
    module = built(third(teacher, divergence=Divergence("reverse_kl", temperature=2.0), hard_loss=0.25), tmp_path)
    (batch,) = tiny_batches(1)
    loss = module.criterion(module(batch), batch)
    ours, theirs = logits(module.built_network, batch), logits(module.built_teacher, batch)
    p, q = (F.log_softmax(one / 2, -1) for one in (ours, theirs))
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    expected = 4 * (p.exp() * (p - q)).sum() + 0.25 * F.cross_entropy(ours, labels, reduction="sum")
    torch.testing.assert_close(loss.sum, expected, rtol=1e-5, atol=0.0)
    assert int(loss.weight) == len(labels)


def test_inner_losses_are_added_and_their_projections_train(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 2, "hidden_size": 48, "head_dim": 12, "num_key_value_heads": 4}
    folder = save(LlamaForCausalLM(LlamaConfig(**(tiny_llama(VOCAB).config.to_dict() | fields))), tmp_path / "wide")
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    module = Distillation(
        FromConfig("llama", small),
        teacher=Pretrained(folder),
        hidden_states=HiddenStateLoss(weight=2.0),
        relations=RelationLoss(num_heads=2),
        schedule=Schedule(shape="constant", warmup=0),
    )
    assert module.tokenizer_source == folder
    trainer = fit(module, tmp_path)
    (batch,) = tiny_batches(1)
    whole = module.criterion(module(batch), batch).sum
    module.inner.relations = None
    module.inner._hidden_maps, module.inner._relation_map = {}, {}
    without = module.criterion(module(batch), batch).sum
    assert whole > without + 0.01
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert id(module.inner.projections["1"].weight) in trained
    assert not {id(p) for p in module.built_teacher.parameters()} & trained


def test_student_learns_and_teacher_stays(teacher: str, tmp_path: Path) -> None:
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    module = third(teacher, hidden_states=HiddenStateLoss("cosine", layers={0: 0, -1: -1}), gradient_checkpointing=True)
    fit(module, tmp_path, 12, [Watch()])
    assert losses[-1] < 0.5 * losses[0]
    before = Pretrained(teacher).build(BuildRequest("causal", None)).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in module.built_teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in module.built_teacher.parameters())


def test_validation_measures_the_divergence_beside_the_tokens(teacher: str, tmp_path: Path) -> None:
    module = third(teacher, divergence=Divergence(temperature=2.0), hard_loss=0.5)
    (values,) = tiny_trainer(tmp_path, []).validate(module, tiny_loader(tiny_batches(2)), verbose=False)
    sums = [0.0, 0.0, 0.0]
    for batch in tiny_batches(2):
        with torch.no_grad():
            ours, theirs = logits(module.built_network, batch), logits(module.built_teacher, batch)
        labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
        pair = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
        sums[0] += 4 * float(F.kl_div(*pair, reduction="sum", log_target=True))
        sums[1] += float(F.cross_entropy(ours, labels, reduction="sum"))
        sums[2] += len(labels)
    assert values["val/divergence"] == pytest.approx(sums[0] / sums[2], rel=1e-5)
    assert values["val/loss"] == pytest.approx(sums[1] / sums[2], rel=1e-5)
    assert {"val/perplexity", "val/token_accuracy", "val/bits_per_byte"} <= set(values)


def test_a_run_goes_on_after_a_validation(teacher: str, tmp_path: Path) -> None:
    module = third(teacher)
    tiny_trainer(tmp_path, []).validate(module, tiny_loader(tiny_batches(1)), verbose=False)
    fit(module, tmp_path)


def test_teacher_drops_nothing_out(teacher: str, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.5)
    folder = save(GPT2LMHeadModel(config), tmp_path / "gpt2")
    module = Distillation(
        EveryNthLayer(teacher, 3), teacher=Pretrained(folder), schedule=Schedule(shape="constant", warmup=0)
    )
    built(module, tmp_path)
    (batch,) = tiny_batches(1)
    module.train()
    assert module.criterion(module(batch), batch).sum == module.criterion(module(batch), batch).sum
    assert module.built_network.training


def test_a_student_that_structured_pruning_makes(tmp_path: Path) -> None:
    """Its hidden states are narrower than the teacher's from then on, and its layers are fewer."""
    teacher = save_teacher(tmp_path / "teacher")
    module = Distillation(
        Pretrained(teacher, dtype="float32"),
        teacher=Pretrained(teacher, dtype="float32"),
        hidden_states=HiddenStateLoss("cosine"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
        schedule=Schedule(shape="constant", warmup=0),
    )
    pruning = StructuredPruning(layers=2, channels=8, num_documents=4)
    trainer = tiny_trainer(tmp_path, [pruning], max_epochs=4)
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=chats(tmp_path))
    sizes = [(len(network.model.layers), network.config.hidden_size) for network in (module.network, module.teacher)]  # type: ignore[union-attr]
    assert sizes == [(2, 24), (4, 32)]
    assert {tuple(parameter.shape) for parameter in module.inner.parameters()} == {(32, 24)}
    assert losses[-1] < 0.8 * losses[0]


class TestCheckpoints:
    def saved(self, module: Distillation, folder: Path) -> Path:
        fit(module, folder).save_checkpoint(folder / "it.ckpt")
        return folder / "it.ckpt"

    def test_teacher_is_not_in_it_and_training_goes_on(self, teacher: str, tmp_path: Path) -> None:
        fields = {"hidden_states": HiddenStateLoss()}
        module = third(teacher, **fields)
        file = self.saved(module, tmp_path)
        state = torch.load(file, weights_only=True)["state_dict"]
        assert not [name for name in state if name.startswith("teacher.")]
        assert [name for name in state if name.startswith("network.")]
        again, uninterrupted = third(teacher, **fields), third(teacher, **fields)
        trainer = tiny_trainer(tmp_path, [], max_steps=4, max_epochs=-1)
        trainer.fit(again, *(tiny_loader(tiny_batches(2)) for _ in range(2)), ckpt_path=file)
        fit(uninterrupted, tmp_path, steps=4)
        state = again.state_dict()
        for name, value in uninterrupted.state_dict().items():
            assert torch.equal(state[name], value), name

    def test_a_student_from_scratch_keeps_its_frozen_weights_only(self, teacher: str, tmp_path: Path) -> None:
        fields = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        network = FromConfig("llama", fields)
        module = Distillation(network, LoRA(2), teacher=Pretrained(teacher), schedule=Schedule("constant", warmup=0))
        state = torch.load(self.saved(module, tmp_path), weights_only=True)["state_dict"]
        assert any("base_layer" in name for name in state)
        assert not [name for name in state if name.startswith("teacher.")]

    def test_a_teacher_that_cannot_be_built_again_is_in_it(self, teacher: str, tmp_path: Path) -> None:
        own = FromConfig("llama", {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2})
        module = Distillation(EveryNthLayer(teacher, 3), teacher=own, schedule=Schedule(shape="constant", warmup=0))
        file = self.saved(module, tmp_path)
        again = Distillation(EveryNthLayer(teacher, 3), teacher=own, schedule=Schedule(shape="constant", warmup=0))
        tiny_trainer(tmp_path, []).validate(again, tiny_loader(tiny_batches(1)), ckpt_path=file, verbose=False)
        for name, value in module.built_teacher.state_dict().items():
            assert torch.equal(value, again.built_teacher.state_dict()[name])

    def test_the_network_alone(self, teacher: str, tmp_path: Path) -> None:
        """As the commands that use a run build it: no trainer, no teacher."""
        file = self.saved(third(teacher, hidden_states=HiddenStateLoss()), tmp_path)
        module = third(teacher, hidden_states=HiddenStateLoss())
        module.configure_model()
        state = torch.load(file, weights_only=True)
        module.on_load_checkpoint(state)
        module.load_state_dict(state["state_dict"], strict=False)
        assert module.teacher is None
        with pytest.raises(RuntimeError, match="the teacher is not built"):
            module.criterion(module(tiny_batches(1)[0]), tiny_batches(1)[0])


def test_quantized_teacher(teacher: str, tmp_path: Path) -> None:
    import bitsandbytes

    module = built(third(teacher, teacher_bits=4), tmp_path)
    layer = module.built_teacher.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert not isinstance(module.built_network.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)


class TestVocabularies:
    def test_padded_to_two_sizes(self, teacher: str, tmp_path: Path) -> None:
        folder = save(tiny_llama(VOCAB + 8), tmp_path / "padded")
        module = Distillation(
            EveryNthLayer(teacher, 3), teacher=Pretrained(folder), schedule=Schedule(shape="constant", warmup=0)
        )
        built(module, tmp_path)
        (batch,) = tiny_batches(1)
        loss = module.criterion(module(batch), batch).sum
        ours, theirs = logits(module.built_network, batch), logits(module.built_teacher, batch)[:, :VOCAB]
        expected = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)

    def test_another_tokenizer_is_refused(self, teacher: str, tmp_path: Path) -> None:
        words = {word: index for index, word in enumerate(["<unk>", *sorted(set(TEXT.split()))])}
        other = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        other.pre_tokenizer = pre_tokenizers.Whitespace()
        folder = save(tiny_llama(VOCAB), tmp_path / "other", PreTrainedTokenizerFast(tokenizer_object=other))
        module = Distillation(EveryNthLayer(teacher, 3), teacher=Pretrained(folder))
        with pytest.raises(
            ValueError, match=r"token 0 is '<eos>' in the data's tokenizer and '<unk>' in the teacher's"
        ):
            fit(module, tmp_path)


def test_negative_weight(teacher: str) -> None:
    with pytest.raises(ValueError, match="hard_loss is -1"):
        third(teacher, hard_loss=-1)
