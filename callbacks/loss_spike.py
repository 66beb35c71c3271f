"""LossSpike: reports a step whose loss jumps, with the documents that were in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.callbacks.non_finite_loss import DescribesDocuments


class _MicroBatch(NamedTuple):
    """What is kept of a batch until its optimizer step is over; all on the device."""

    loss_sum: Tensor
    weight: Tensor
    document_ids: Tensor


class LossSpike(Callback):
    """Warns when a step's loss exceeds the running mean by `threshold` running standard deviations.

    The warning names the documents of the step's worst micro-batch (over all ranks); the loggers get
    `train/loss_spike`, the excess in standard deviations, at that very step. Mean and variance are exponential, without
    the bias of their beginning, and part of the checkpoint; a standard deviation counts as at least a hundredth of the
    mean. A spike does not enter them, unless the step before was one too: then it is the new level. The loss is fetched
    from the device each step.

    Args:
        threshold: How many standard deviations are a spike.
        memory: Over about how many steps the mean goes; no spike is reported before that many.
        max_documents: How many documents a warning names.
    """

    def __init__(self, threshold: float = 6.0, memory: int = 50, max_documents: int = 8) -> None:
        if threshold <= 0 or memory < 2:
            raise ValueError(f"threshold is above 0 and memory at least 2, not {threshold} and {memory}")
        self.threshold = threshold
        self.memory = memory
        self.max_documents = max_documents
        self._steps = 0
        self._mean = 0.0
        self._variance = 0.0
        self._was_spike = False
        self._steps_done = 0
        self._step: list[_MicroBatch] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "mean": self._mean, "variance": self._variance, "was_spike": self._was_spike}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict["steps"]
        self._mean = state_dict["mean"]
        self._variance = state_dict["variance"]
        self._was_spike = state_dict["was_spike"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_done = trainer.global_step
        self._step = []

    @override
    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Mapping[str, Tensor],
        batch: TextBatch,
        batch_idx: int,
    ) -> None:
        self._step.append(_MicroBatch(outputs["loss_sum"], outputs["weight"], batch["document_ids"]))
        if trainer.global_step == self._steps_done:
            return
        self._steps_done = trainer.global_step
        sums = torch.stack([torch.stack([one.loss_sum, one.weight]).double() for one in self._step]).sum(0)
        total = trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        loss_sum, weight = total.tolist()
        excess = self.observe(loss_sum / max(weight, 1.0))
        if excess > self.threshold:
            for logger in trainer.loggers:
                logger.log_metrics({"train/loss_spike": excess}, step=trainer.global_step - 1)  # as Lightning counts
            self._warn(trainer, loss_sum / max(weight, 1.0), excess)
        self._step = []

    def observe(self, loss: float) -> float:
        """Take in a step's loss and return its distance from the mean before, in standard deviations.

        It is 0 in the first `memory` steps. A loss that is no number is not taken in.
        """
        if not math.isfinite(loss):
            return 0.0
        excess = 0.0
        if self._steps >= self.memory:
            # Where the loss hardly moves, what counts is a share of it.
            excess = (loss - self._mean) / max(math.sqrt(self._variance), 0.01 * abs(self._mean), 1e-12)
        is_spike = excess > self.threshold
        if not is_spike or self._was_spike:
            # 1 / (n + 1) at first, so that the beginning weighs no more than what follows it.
            rate = max(1 / (self._steps + 1), 1 / self.memory)
            difference = loss - self._mean
            self._mean += rate * difference
            self._variance = (1 - rate) * (self._variance + rate * difference**2)
            self._steps += 1
        self._was_spike = is_spike
        return excess

    def _warn(self, trainer: Trainer, loss: float, excess: float) -> None:
        worst, documents = max(_gathered(_worst_micro_batch(self._step)))
        datamodule = getattr(trainer, "datamodule", None)
        names = [str(document) for document in documents[: self.max_documents]]
        if isinstance(datamodule, DescribesDocuments):
            names = [datamodule.describe_document("train", document) for document in documents[: self.max_documents]]
        more = len(documents) - len(names)
        rank_zero_warn(
            f"step {trainer.global_step}: loss {loss:.3f} is {excess:.1f} standard deviations above its running mean "
            f"{self._mean:.3f}; the worst batch (loss {worst:.3f}) holds {', '.join(names)}"
            f"{f' and {more} more' if more else ''}"
        )


def _worst_micro_batch(step: list[_MicroBatch]) -> tuple[float, list[int]]:
    """Return the highest mean loss of a micro-batch, and its documents."""
    losses = [float(one.loss_sum / one.weight.clamp(min=1)) for one in step]
    worst = losses.index(max(losses))
    documents = step[worst].document_ids.unique().tolist()
    return losses[worst], [document for document in documents if document != PADDING_DOCUMENT]


def _gathered(mine: tuple[float, list[int]]) -> list[tuple[float, list[int]]]:
    """Collect every rank's answer on every rank."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[tuple[float, list[int]]] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
