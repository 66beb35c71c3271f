"""RewindMetrics: a resumed run writes its metrics where the checkpoint was, not behind what came after it."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightllm.loggers import RunCSVLogger


class RewindMetrics(Callback):
    """Drops the rows of `metrics.csv` that a resumed run is going to write again.

    A run that was killed at step 57 and resumes from the checkpoint of step 50 has rows up to 56 in its file; those
    from 50 on go when training starts. A run that starts anew in an old folder starts an empty file. (TensorBoard does
    the same by itself when it reads; W&B draws what it is sent.)
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                # Lightning logs optimizer step n (from 1) as n - 1, so the next row is that of global_step.
                logger.rewind(trainer.global_step)
