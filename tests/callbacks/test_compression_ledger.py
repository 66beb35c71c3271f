from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_chats, save_small_network
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_run import TinyModule, tiny_batches, tiny_loader
from torch import nn
from typing_extensions import override

from lightllm.callbacks import Checkpoint, CompressionLedger, RandomState, Transforming
from lightllm.checkpoint_io import newest_checkpoint
from lightllm.compression.effects import mask_layers
from lightllm.compression.ledger import Ledger, LedgerRow
from lightllm.datamodules import Batches, ChatData, Reading
from lightllm.evaluate import evaluate_text
from lightllm.models import EveryNthLayer, LoRA, Pretrained, Record, Transformation, TransformationKind
from lightllm.models.layer_subset import keep_layers
from lightllm.modules import Distillation, FineTuning, LanguageModule, Schedule

EMBEDDING = 320 * 32
BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
LINEAR = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48


class _FirstBlock(Transformation):
    kind = TransformationKind.STRUCTURE

    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        keep_layers(network, [0])
        return {"kept": [0]}


class FirstBlock(Transforming):
    """Keeps the first block only."""

    @override
    def transformation(self) -> Transformation:
        return _FirstBlock("FirstBlock")


class _Masks(Transformation):
    kind = TransformationKind.MASK

    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        self.layers = mask_layers(network, [])
        return None


class HalfMasked(Transforming):
    """Masks every second column once, after the second step."""

    def __init__(self) -> None:
        self.masks = _Masks("HalfMasked")

    @override
    def transformation(self) -> Transformation:
        return self.masks

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            for layer in self.masks.layers.values():
                keep = torch.ones(layer.base.weight.shape, dtype=torch.bool)
                keep[:, ::2] = False
                layer.set_keep(keep)
            self.announce(pl_module)


class Run:
    """A run of a few steps with dropout in a folder."""

    def __init__(self, folder: Path, *callbacks: Callback, val_fraction: float = 0.25, **fields: Any) -> None:
        module: LanguageModule | None = fields.pop("module", None)
        self.module = module or FineTuning(
            Pretrained(str(folder / "network")), fields.pop("adapter", None), **settings()
        )
        self.data = ChatData(
            train=str(folder / "chats.jsonl"),
            max_length=128,
            batches=Batches(documents=4),
            reading=Reading(val_fraction=val_fraction, cache=str(folder / "cache")),
        )
        self.trainer = Trainer(
            default_root_dir=folder / "run",
            callbacks=[*callbacks, RandomState(), Checkpoint(every_n_train_steps=1, keep=9)],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_steps": 3, **fields},
        )

    def fit(self, resume: Path | None = None) -> Run:
        torch.manual_seed(1)
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=True)
        return self

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()


def settings() -> dict[str, Any]:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    return {"optimizer": optimizer, "schedule": Schedule("constant")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_small_network(tmp_path / "network")
    save_chats(tmp_path / "chats.jsonl", 16)
    return tmp_path


def rows(folder: Path) -> list[LedgerRow]:
    return Ledger(folder / "run" / "ledger.jsonl").rows


def keys(folder: Path) -> list[tuple[str, int | None]]:
    return [row.key for row in rows(folder)]


def quick(**fields: Any) -> CompressionLedger:
    return CompressionLedger(generation=False, **fields)


def test_a_run_without_compression_has_a_row_before_and_one_after(folder: Path) -> None:
    run = Run(folder, CompressionLedger(limit=None, new_tokens=4)).fit()
    before, after = rows(folder)
    assert (before.key, after.key) == (("dense", 0), ("trained", 3))
    vocabulary = len(run.data.loaded_tokenizer)
    size = vocabulary * 32 + 2 * BLOCK + 32
    assert (before.parameters, before.nonzero_parameters, before.weight_bytes) == (size, size, 4 * size)
    assert before.bits_per_weight == 32
    for row in (before, after):
        assert row.tokens_per_second is not None
        assert row.tokens_per_second > 1
        assert row.peak_memory is not None
        assert row.peak_memory > 4 * size
        assert row.device
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["checkpoints", "ledger.jsonl"]

    (validated,) = run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert after.loss == pytest.approx(validated["val/loss"], rel=1e-5)
    fresh = Run(folder)
    (validated,) = fresh.trainer.validate(fresh.module, datamodule=fresh.data, verbose=False)
    assert before.loss == pytest.approx(validated["val/loss"], rel=1e-5)
    assert before.loss > after.loss


def test_the_loss_is_that_of_some_documents(folder: Path) -> None:
    run = Run(folder, quick(limit=2)).fit()
    few = run.data.excerpt("val", 2)
    expected = evaluate_text(run.module.built_network, None, few)
    after = rows(folder)[-1]
    assert after.loss == pytest.approx(expected.loss, rel=1e-6)
    everything = evaluate_text(run.module.built_network, None, run.data.excerpt("val"))
    assert after.target_tokens == expected.num_tokens < everything.num_tokens
    assert (after.tokens_per_second, after.peak_memory, after.device) == (None, None, None)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, dropout=0.2)])
def test_training_goes_on_as_if_nothing_had_been_measured(folder: Path, adapter: LoRA | None) -> None:
    fields = {"adapter": adapter, "val_check_interval": 1}
    watched, plain = Run(folder, FirstBlock(), quick(), **fields), Run(folder, FirstBlock(), **fields)
    watched.fit()
    plain.fit()
    assert watched.state.keys() == plain.state.keys()
    assert all(torch.equal(one, plain.state[name]) for name, one in watched.state.items())
    positions = [run.data.state_dict()["train"] for run in (watched, plain)]
    assert positions[0] == positions[1]


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
@pytest.mark.parametrize("first", [True, False])
def test_each_step_has_a_row_wherever_the_ledger_stands(folder: Path, adapter: LoRA | None, first: bool) -> None:
    steps: list[Callback] = [HalfMasked(), FirstBlock()]
    run = Run(folder, *([quick(), *steps] if first else [*steps, quick()]), adapter=adapter).fit()
    assert keys(folder) == [("dense", 0), ("FirstBlock", 0), ("HalfMasked", 2), ("trained", 3)]
    dense, smaller, masked, trained = rows(folder)
    size = len(run.data.loaded_tokenizer) * 32 + 2 * BLOCK + 32
    assert [row.parameters for row in rows(folder)] == [size, *[size - BLOCK] * 3]
    assert dense.nonzero_parameters == size
    assert smaller.nonzero_parameters == size - BLOCK
    assert masked.nonzero_parameters == trained.nonzero_parameters == size - BLOCK - LINEAR // 2
    assert len({row.loss for row in rows(folder)}) == 4


def test_a_resumed_run_has_one_row_a_step(folder: Path) -> None:
    Run(folder, FirstBlock(), HalfMasked(), quick(), max_steps=2).fit()
    begun = rows(folder)
    assert [row.key for row in begun] == [("dense", 0), ("FirstBlock", 0), ("HalfMasked", 2), ("trained", 2)]
    newest = newest_checkpoint(folder / "run" / "checkpoints")
    Run(folder, FirstBlock(), HalfMasked(), quick(), max_steps=4).fit(resume=newest)
    assert rows(folder)[:4] == begun
    assert keys(folder)[4:] == [("trained", 4)]
    # Resumed from before a step that was measured, it is measured anew, in its place; what came after is dropped.
    first = folder / "run" / "checkpoints" / "step=1.ckpt"
    Run(folder, FirstBlock(), HalfMasked(), quick(), max_steps=3).fit(resume=first)
    assert keys(folder) == [("dense", 0), ("FirstBlock", 0), ("HalfMasked", 2), ("trained", 3)]
    assert rows(folder)[:2] == begun[:2]
    assert rows(folder)[2].loss == pytest.approx(begun[2].loss, rel=1e-6)


def test_a_run_that_begins_in_an_old_folder_begins_an_empty_ledger(folder: Path) -> None:
    Run(folder, FirstBlock(), quick(), max_steps=1).fit()
    Run(folder, quick(), max_steps=2).fit()
    assert keys(folder) == [("dense", 0), ("trained", 2)]


def test_the_teacher_has_a_row(folder: Path) -> None:
    network = str(folder / "network")
    module = Distillation(EveryNthLayer(network, 2), teacher=Pretrained(network), **settings())
    Run(folder, quick(), module=module).fit()
    assert keys(folder) == [("dense", 0), ("teacher", 0), ("trained", 3)]
    student, teacher, _ = rows(folder)
    assert teacher.parameters - student.parameters == BLOCK
    (validated,) = (run := Run(folder)).trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert teacher.loss == pytest.approx(validated["val/loss"], rel=1e-5)


def test_without_validation_data_there_is_no_loss(folder: Path) -> None:
    Run(folder, quick(), val_fraction=0.0, max_steps=1).fit()
    assert [row.loss for row in rows(folder)] == [None, None]


def test_a_trial_generates_nothing(folder: Path) -> None:
    ledger = CompressionLedger()
    Run(folder, ledger, fast_dev_run=True).fit()
    assert rows(folder)[-1].loss is not None
    assert rows(folder)[-1].tokens_per_second is None


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        CompressionLedger(limit=0)
    with pytest.raises(ValueError, match="new_tokens is 0"):
        CompressionLedger(new_tokens=0)
    run = Run(folder)
    run.trainer._accelerator_connector.strategy = ModelParallelStrategy()
    with pytest.raises(ValueError, match="shards it"):
        quick().setup(run.trainer, run.module, "fit")
    trainer = Trainer(default_root_dir=folder, callbacks=[quick()], accelerator="cpu", logger=False, max_steps=1)
    with pytest.raises(ValueError, match="and there is none"):
        trainer.fit(TinyModule(), tiny_loader(tiny_batches(1)), tiny_loader(tiny_batches(1)))
