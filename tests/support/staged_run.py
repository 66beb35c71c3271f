"""Training runs that a pipeline must take as one process does: packed unequal rows, accumulation, clipping, decay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback
from ranks import run_on_ranks
from tiny_objective import MeasuredBatches, adamw, documents, scratch
from tiny_run import tiny_trainer
from torch import Tensor

from lightllm.batch import Document, TextBatch, pack_documents
from lightllm.callbacks import Checkpoint
from lightllm.models import Adapter
from lightllm.modules import CausalPretraining, FineTuning, LanguageModule, Schedule
from lightllm.parallel import PipelineParallelStrategy
from lightllm.parallel.data_ranks import data_rank, num_data_ranks

Reference = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
"""Makes a run of one process: what `train` returns, and its checkpoint."""

STEPS = 10
ACCUMULATE = 2


def packed_rows(rows: int, seed: int) -> TextBatch:
    """A batch of so many rows, each of a random number of documents, of unequal length; the rest of it is padding."""
    generator = torch.Generator().manual_seed(seed)
    laid: list[list[Document]] = []
    for index in range(rows):
        count = int(torch.randint(1, 4, (), generator=generator))
        laid.append(documents(count, seed=1000 * seed + index))
    return pack_documents(laid)


def global_batches(ranks: int, steps: int = STEPS, seed: int = 0) -> list[TextBatch]:
    """Those of a whole run: in each optimizer step `ACCUMULATE` on each of so many data ranks, of 3 to 6 rows."""
    return [packed_rows(3 + index % 4, seed=seed + index) for index in range(steps * ACCUMULATE * ranks)]


def module(
    tied: bool = True, adapter: Adapter | None = None, layers: int = 4, architecture: str = "llama", **fields: Any
) -> LanguageModule:
    """An objective whose network is still to be built, with the same weights every time."""
    network = scratch(architecture, num_hidden_layers=layers, tie_word_embeddings=tied)
    settings: dict[str, Any] = {"optimizer": adamw(3e-3), "schedule": Schedule("cosine", warmup=2)} | fields
    if adapter is None:
        return CausalPretraining(network, **settings)
    return FineTuning(network, adapter, **settings)


class OwnShare(MeasuredBatches):
    """Gives a rank its batches: of each step's, in turn."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        own = self.train[data_rank(strategy) :: num_data_ranks(strategy)]
        return torch.utils.data.DataLoader(own, batch_size=None)  # type: ignore[arg-type]


class Losses(Callback):
    """Notes the logged training loss of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.seen.append(float(trainer.callback_metrics["train/loss"]))


def train(
    objective: LanguageModule, batches: list[TextBatch], folder: Path, accumulate: int = ACCUMULATE, **fields: Any
) -> dict[str, Any]:
    """Run the batches once, as one epoch; what came of it: losses and validation. A checkpoint is in `folder`."""
    torch.manual_seed(0)
    noted = Losses()
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5} | fields
    resumed = options.pop("ckpt_path", None)
    callbacks = [noted, Checkpoint(every_n_epochs=1, monitor=None), *options.pop("callbacks", [])]
    trainer = tiny_trainer(folder, callbacks, use_distributed_sampler=False, enable_checkpointing=True, **options)
    data = OwnShare(batches, [packed_rows(5, seed=77), packed_rows(2, seed=78)], mode="packed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # of sums that torchmetrics has synchronised
        trainer.fit(objective, data, ckpt_path=resumed, weights_only=True)
    return {"losses": noted.seen, "validation": float(trainer.callback_metrics["val/loss"])}


def checkpoint(folder: Path) -> Path:
    """What `train` left."""
    return folder / "checkpoints" / "last.ckpt"


def read(folder: Path) -> dict[str, Any]:
    """The content of that."""
    content = torch.load(checkpoint(folder), weights_only=True)
    assert isinstance(content, dict)
    return content


def assert_same_weights(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The same names with the same values."""
    assert sorted(ours) == sorted(expected)
    for name, value in expected.items():
        difference = float((ours[name].double() - value.double()).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def fit(
    folder: Path,
    strategy: dict[str, Any],
    fields: dict[str, Any],
    batches: list[TextBatch],
    run: dict[str, Any] | None = None,
) -> Any:
    """A run on one of several ranks."""
    devices = torch.distributed.get_world_size()
    run = {"strategy": PipelineParallelStrategy(**strategy), "devices": devices} | (run or {})
    return train(module(**fields), batches, folder, **run)


def compare_with_one_process(
    folder: Path, one_process: Reference, world_size: int, strategy: dict[str, Any], name: str = "full", **fields: Any
) -> None:
    """Train in a pipeline and in one process, on the same batches of every optimizer step."""
    data_ranks = world_size // (strategy["pipeline"] * strategy.get("tensor", 1))
    expected, whole = one_process(name, fields, data_ranks)
    for rank in run_on_ranks(fit, world_size, folder, strategy, fields, global_batches(data_ranks), seconds=240):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["validation"] == pytest.approx(expected["validation"], rel=1e-5)
    ours = read(folder)
    assert_same_weights(ours["state_dict"], whole["state_dict"])
    for mine, theirs in zip(ours["optimizer_states"], whole["optimizer_states"], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        assert_same_weights(moments(mine), moments(theirs))


def moments(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{index} {key}": value for index, of in state["state"].items() for key, value in of.items()}
