"""SharedRunFolder: all ranks of a run write to the folder that the first of them chose."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class SharedRunFolder(Callback):
    """Makes the first rank's `trainer.default_root_dir` that of every rank, before other callbacks read it.

    A new run takes a folder that no run has. Each rank looks for one by itself, at another moment, and each would find
    another: so the first one's counts.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(trainer.default_root_dir)
        trainer._default_root_dir = folder  # type: ignore[attr-defined]  # it is set from outside of the class
