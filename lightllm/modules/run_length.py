"""How many optimizer steps a run has, found without disturbing it."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage


def total_optimizer_steps(trainer: Trainer) -> int | None:
    """Optimizer steps until the run ends; None if it ends by time or by hand.

    Lightning's own estimate sets up the training loader early, and a resumed run then loses its place in the data
    (pytorch-lightning #20550), so the length is asked of the datamodule, or of a loader made for the question only.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = _batches_per_epoch(trainer)
        if batches is not None:
            limits.append(math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(limits, default=None)


def _batches_per_epoch(trainer: Trainer) -> int | None:
    datamodule = getattr(trainer, "datamodule", None)
    batches = getattr(datamodule, "num_train_batches", None)
    limit = trainer.limit_train_batches
    if batches is None:
        loader = trainer.fit_loop._data_source.dataloader()
        # With several ranks, each sees its share of the rows: Lightning puts in the sampler that deals them out.
        prepared = trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)
        try:
            batches = len(prepared)  # type: ignore[arg-type]  # Lightning takes any iterable
        except TypeError:  # an iterable dataset has no length
            return limit if isinstance(limit, int) else None
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
