from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from taught import ask, chats, distillation, save_teacher
from tiny_networks import tiny_llama, tiny_tokenizer
from tiny_run import tiny_batches, tiny_loader, tiny_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lightllm.callbacks import RandomState
from lightllm.datamodules import Batches, Reading, TextData
from lightllm.losses import Divergence
from lightllm.models import EveryNthLayer, FromConfig, Pretrained
from lightllm.modules import Distillation, HiddenStateLoss, RelationLoss, TeacherCache
from lightllm.modules.cached_teacher import NotTaught, documents_to_ask
from lightllm.teach import teach

ALL = 320
"""The tokens of the tokenizer, and so of the networks."""


class Watch(Callback):
    """Notes the losses, and saves after the third batch of a run that is not resumed."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss_sum"] / outputs["weight"]))
        if len(self.losses) == trainer.global_step == 3:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/third.ckpt", weights_only=False)


def fit(module: Distillation, data: Any, folder: Path, **fields: Any) -> tuple[Trainer, list[float]]:
    watch = Watch()
    resume = fields.pop("resume", None)
    trainer = tiny_trainer(folder, [watch, RandomState()], **{"max_epochs": 2} | fields)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer, watch.losses


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return save_teacher(tmp_path / "teacher")


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache(k=ALL, folder=str(tmp_path / "answers"))


@pytest.mark.parametrize(
    "batches", [Batches("packed", documents=3), Batches("sorted", documents=2), Batches("packed", tokens=128)], ids=str
)
@pytest.mark.parametrize("kind", ["forward_kl", "total_variation"])
def test_all_tokens_train_as_the_teacher_itself(
    teacher: str, cache: TeacherCache, tmp_path: Path, batches: Batches, kind: Any
) -> None:
    """Two epochs of differently shuffled batches, some documents cut to 40 positions, mixed with the hard loss."""
    fields: dict[str, Any] = {"divergence": Divergence(kind, temperature=2.0), "hard_loss": 0.3}
    data = {"batches": batches, "max_length": 40 if batches.documents else 64}
    ask(teacher, chats(tmp_path, **data), cache, fields["divergence"])
    module = distillation(teacher, cache, **fields)
    trainer, losses = fit(module, chats(tmp_path, **data), tmp_path)
    live, live_losses = fit(distillation(teacher, None, **fields), chats(tmp_path, **data), tmp_path)
    assert len(losses) > 2
    assert losses == pytest.approx(live_losses, rel=2e-2)
    for name in ("val/divergence", "val/loss"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(live.callback_metrics[name]), rel=2e-2)
    assert module.teacher is None


@pytest.mark.parametrize("sizes", [(ALL, ALL + 8), (ALL + 8, ALL)])
def test_a_vocabulary_padded_to_two_sizes(cache: TeacherCache, tmp_path: Path, sizes: tuple[int, int]) -> None:
    folders = []
    for size, name in zip(sizes, ("student", "teacher"), strict=True):
        torch.manual_seed(size)
        fields = {**tiny_llama(size).config.to_dict(), "max_position_embeddings": 256}
        LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        folders.append(str(tmp_path / name))

    def module(cached: TeacherCache | None) -> Distillation:
        made = distillation(folders[0], cached)
        made.teacher_network = Pretrained(folders[1], dtype="float32")
        return made

    teach(module(cache), chats(tmp_path))
    values = []
    for one in (module(cache), module(None)):
        (found,) = tiny_trainer(tmp_path, []).validate(one, datamodule=chats(tmp_path), verbose=False)
        values.append(found["val/divergence"])
    assert values[0] == pytest.approx(values[1], rel=5e-3)


def test_the_teacher_need_not_be_there(
    teacher: str, cache: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(teacher, chats(tmp_path), cache)
    module = distillation(teacher, cache)
    monkeypatch.setattr(Distillation, "build_teacher", None)
    _, losses = fit(module, chats(tmp_path), tmp_path)
    assert losses[-1] < losses[0]
    assert not [name for name in module.state_dict() if name.startswith("teacher")]


def test_a_resumed_run_is_the_uninterrupted_one(teacher: str, cache: TeacherCache, tmp_path: Path) -> None:
    ask(teacher, chats(tmp_path), cache)
    whole = distillation(teacher, cache)
    fit(whole, chats(tmp_path), tmp_path)
    again = distillation(teacher, cache)
    _, losses = fit(again, chats(tmp_path), tmp_path, resume=tmp_path / "third.ckpt")
    assert len(losses) == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class TestWhatIsNotKnown:
    def test_a_teacher_that_was_not_asked(self, teacher: str, cache: TeacherCache, tmp_path: Path) -> None:
        with pytest.raises(NotTaught, match=r"not asked yet about the train data .* k 320 and temperature 1 .*teach"):
            fit(distillation(teacher, cache), chats(tmp_path), tmp_path)
        ask(teacher, chats(tmp_path), cache)
        with pytest.raises(NotTaught, match="temperature 3"):
            fit(distillation(teacher, cache, divergence=Divergence(temperature=3.0)), chats(tmp_path), tmp_path)
        with pytest.raises(NotTaught, match="the train data"):
            fit(distillation(teacher, cache), chats(tmp_path, max_length=40), tmp_path)

    def test_a_batch_of_other_documents(self, teacher: str, cache: TeacherCache, tmp_path: Path) -> None:
        ask(teacher, chats(tmp_path), cache)
        data, module = chats(tmp_path), distillation(teacher, cache)
        fit(module, data, tmp_path)
        (batch,) = data.excerpt("val")
        assert module.predictions is not None
        module.predictions.answers(batch, "val")
        document = int(batch["document_ids"][0, 0])
        with pytest.raises(ValueError, match=rf"position \d+ of document {document} of the train data .*chats.jsonl:"):
            module.predictions.answers(batch, "train")
        with pytest.raises(ValueError, match="not asked about the test data, only about train, val"):
            module.predictions.answers(batch, "test")


class TestRefusals:
    def test_before_anything_is_built(self, teacher: str) -> None:
        cache = TeacherCache()
        with pytest.raises(ValueError, match="reverse_kl cannot be learned from a teacher's likeliest tokens"):
            distillation(teacher, cache, divergence=Divergence("reverse_kl"))
        with pytest.raises(ValueError, match="hidden_states and relations: a cached teacher says what it predicts"):
            distillation(teacher, cache, hidden_states=HiddenStateLoss(), relations=RelationLoss())
        with pytest.raises(ValueError, match="FromConfig is another network each time"):
            Distillation(EveryNthLayer(teacher, 2), teacher=FromConfig("llama", {}), cached=cache)
        with pytest.raises(ValueError, match="k is 0: keep at least 1"):
            TeacherCache(0)

    def test_data_without_numbered_documents(self, teacher: str, cache: TeacherCache, tmp_path: Path) -> None:
        module = distillation(teacher, cache)
        with pytest.raises(ValueError, match="this data has none: take one of lightllm's datamodules"):
            tiny_trainer(tmp_path, []).fit(module, *(tiny_loader(tiny_batches(1)) for _ in range(2)))

    @pytest.mark.parametrize(
        ("fields", "fits"),
        [
            ({}, False),
            ({"batches": Batches("sorted", tokens=256)}, True),
            ({"batches": Batches("packed", documents=2)}, True),
            ({"batches": Batches("sorted", tokens=256), "max_length": 8}, False),
        ],
    )
    def test_texts_that_are_cut_anew(self, teacher: str, tmp_path: Path, fields: Any, fits: bool) -> None:
        file = tmp_path / "text.jsonl"
        file.write_text("".join(f'{{"text": "The whale {number} and the sea."}}\n' for number in range(8)))
        reading = Reading(cache=str(tmp_path / "cache"))
        data = TextData(str(file), tokenizer=teacher, reading=reading, **{"max_length": 64} | fields)
        data.prepare_data()
        data.setup("fit")
        if fits:
            assert set(documents_to_ask(data)) == {"train", "val"}
        else:
            with pytest.raises(ValueError, match="cuts them into rows anew in every epoch, or cuts long ones"):
                documents_to_ask(data)

    def test_a_stream(self, tmp_path: Path, teacher: str) -> None:
        save = chats(tmp_path)
        reading = Reading(streaming=True, cache=str(tmp_path / "cache"))
        data = type(save)(save.train, save.train, tokenizer=teacher, max_length=64, reading=reading)
        data.prepare_data()
        data.setup("fit")
        with pytest.raises(ValueError, match="which those of a stream have not"):
            documents_to_ask(data)
