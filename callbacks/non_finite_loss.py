"""A loss that is no number stops the run before it reaches the weights."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.batch import PADDING_DOCUMENT
from lightllm.checkpoint_io import newest_checkpoint

NAMED_DOCUMENTS = 8
"""Documents of a batch that an error names; a packed batch may hold hundreds."""


class NonFiniteLossError(RuntimeError):
    """A loss or a weight was infinite or no number (NaN)."""


@runtime_checkable
class DescribesDocuments(Protocol):
    """A datamodule that can say where a document comes from."""

    def describe_document(self, split: str, document_id: int) -> str:
        """Name a document of a split: `rows.jsonl:17`."""


class NonFiniteLoss(Callback):
    """Stops when a loss is infinite or no number, before the optimizer has seen it, and names the batch's documents.

    Nor are weights saved that are not finite, so the checkpoint that the error names is a good one. All ranks stop
    together. The loss is looked at once an optimizer step, after the backward passes, so a GPU is not kept waiting
    between micro-batches.

    Raises:
        NonFiniteLossError: From `fit`.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._losses: list[tuple[Tensor, Any]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch, self._losses = None, []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((loss.detach(), self._batch))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        finite = bool(torch.stack([loss for loss, _ in losses]).isfinite().all()) if losses else True
        if trainer.strategy.reduce_boolean_decision(finite):
            return
        bad = [batch for loss, batch in losses if not loss.isfinite()]
        documents = [name for names in _gathered(_documents(trainer, bad), trainer.world_size) for name in names]
        _stop(
            trainer, f"the loss of step {trainer.global_step + 1} is not finite; its batch holds {_listed(documents)}"
        )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        bad = [name for name, parameter in pl_module.named_parameters() if not _is_finite(parameter)]
        if not trainer.strategy.reduce_boolean_decision(not bad):
            named = f", such as {bad[0]}" if bad else ""
            _stop(trainer, f"after step {trainer.global_step}, {len(bad)} weights are not finite{named}: not saved")


def _is_finite(parameter: Tensor) -> bool:
    if not parameter.requires_grad or parameter.is_meta:
        return True  # frozen, so it is as it was read; or another rank's
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(local.detach().isfinite().all())


def _stop(trainer: Trainer, reason: str) -> NoReturn:
    folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    checkpoint = next((found for folder in folders if folder and (found := newest_checkpoint(folder))), None)
    good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    raise NonFiniteLossError(
        f"{reason}; {good}. Look at these documents, lower the learning rate, or clip gradients "
        "(trainer.gradient_clip_val)."
    )


def _documents(trainer: Trainer, batches: list[Any]) -> list[str]:
    """The names of the documents in batches, as the datamodule knows them."""
    ids: list[int] = []
    for batch in batches:
        if isinstance(batch, dict) and isinstance(batch.get("document_ids"), Tensor):
            ids += [index for index in batch["document_ids"].unique().tolist() if index != PADDING_DOCUMENT]
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(datamodule, DescribesDocuments):
        return [datamodule.describe_document("train", index) for index in ids]
    return [f"document {index}" for index in ids]


def _listed(documents: list[str]) -> str:
    if not documents:
        return "documents without ids"
    more = len(documents) - NAMED_DOCUMENTS
    return ", ".join(documents[:NAMED_DOCUMENTS]) + (f" and {more} more" if more > 0 else "")


def _gathered(mine: list[str], world_size: int) -> list[list[str]]:
    """Every rank's, in the order of ranks."""
    if world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
