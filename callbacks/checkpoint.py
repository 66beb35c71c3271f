"""Checkpoints from which a run goes on exactly, and the best of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightllm.callbacks import loop_position
from lightllm.checkpoint_io import AtomicCheckpointIO, alias_checkpoint, remove_temporaries
from lightllm.loggers import RunCSVLogger

BEST = "best.ckpt"
LAST = "last.ckpt"


class Checkpoint(ModelCheckpoint):
    """Saves to `RUN/checkpoints` every so often, whenever validation is better than before, and at the end.

        step=500.ckpt   the newest `keep`, by the number of optimizer steps
        last.ckpt       another name of the newest
        best.ckpt       another name of the one with the best `monitor`

    Files are written atomically, and only between optimizer steps: a save that falls due within an accumulation, or
    where validation or the end of the epoch follows at once, waits for it. What is saved is a position from which the
    run ends with the same weights as if it had never stopped (with a data loader that can be resumed, and
    `RandomState`).

    Without any of the three intervals, it saves every 200 optimizer steps.

    Args:
        every_n_train_steps: Save every so many optimizer steps.
        every_n_epochs: Save at the end of every so many epochs.
        train_time_interval: Save every so often.
        monitor: The logged validation metric that tells the best; None keeps no best.
        mode: Whether the best is the lowest (min) or the highest (max).
        keep: How many of the newest are kept.
        dirpath: The folder; `checkpoints` in the run folder when None.
        filename: Of the newest, without its ending; may name metrics: `{epoch}-{step}`.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        keep: int = 1,
        dirpath: str | None = None,
        filename: str = "{step}",
    ) -> None:
        if not (every_n_train_steps or every_n_epochs) and train_time_interval is None:
            every_n_train_steps = 200
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1, so that there is something to resume from")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=-1,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
        )
        self.keep = keep
        self._kept: list[str] = []
        self._best_step = -1
        self._pending = False
        self._pending_score: Tensor | None = None
        self._afterwards: Callable[[Path], None] | None = None
        self._logged_step: int | None = None
        self._loader_states: list[dict[str, Any]] = []

    @property
    @override
    def state_key(self) -> str:
        # Not of the intervals: a run that is resumed with another one still knows its best.
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def request(self, afterwards: Callable[[Path], None]) -> None:
        """Save as soon as the position can be resumed, before a validation rather than after it.

        Args:
            afterwards: Called on every rank with the file's path.
        """
        self._pending, self._afterwards = True, afterwards

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit" and trainer.is_global_zero:
            remove_temporaries(self.dirpath)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._pending, self._pending_score, self._afterwards = False, None, None
        self._logged_step = loop_position.resume_position(trainer, self._loader_states)
        self._loader_states = []
        if trainer.ckpt_path is None:
            return
        self._last_global_step_saved = trainer.global_step
        self._remove_old(trainer)  # the crash may have come between saving and this
        resumed_from = Path(trainer.ckpt_path).absolute()
        if self._best_step == trainer.global_step and resumed_from.parent == Path(self._path("")).absolute():
            self._alias(trainer, str(resumed_from), BEST)  # or between saving and this
        if not self.file_exists(self._path(BEST), trainer):  # resumed from another run's checkpoint
            self._best_step, self.best_model_score, self.best_model_path = -1, None, ""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._logged_step is not None:
            loop_position.set_logged_step(trainer, self._logged_step)
            self._logged_step = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._pending |= self._is_due(trainer)
        if not self._pending or not loop_position.at_optimizer_step(trainer):
            return
        validation = loop_position.validation_due(trainer)
        if validation and self._afterwards is None:
            return  # on_validation_end comes at once
        if loop_position.at_last_batch(trainer) and not validation:
            return  # on_train_epoch_end comes at once
        self._log_now(trainer)
        self._save_if_pending(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._afterwards is not None and loop_position.at_optimizer_step(trainer):
            self._save_if_pending(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._may_save(trainer):
            self._note_score(trainer)
            if loop_position.at_optimizer_step(trainer) and not loop_position.at_last_batch(trainer):
                self._save_if_pending(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._pending = True
        if loop_position.at_optimizer_step(trainer):
            self._save_if_pending(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pending |= self._last_global_step_saved != trainer.global_step
        self._save_if_pending(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loop_position.record_position(trainer, checkpoint["loops"]["fit_loop"])

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loader_states = loop_position.loader_states(checkpoint["loops"]["fit_loop"])

    @override
    def state_dict(self) -> dict[str, Any]:
        score = None if self.best_model_score is None else float(self.best_model_score)
        return {"kept": list(self._kept), "best_step": self._best_step, "best_score": score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept, self._best_step = list(state_dict["kept"]), state_dict["best_step"]
        if state_dict["best_score"] is not None:
            self.best_model_score = torch.tensor(state_dict["best_score"])
            self.best_model_path = self._path(BEST)

    def _path(self, name: str) -> str:
        assert self.dirpath is not None, "setup has not run"
        return os.path.join(self.dirpath, name)

    def _may_save(self, trainer: Trainer) -> bool:
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trial

    def _is_due(self, trainer: Trainer) -> bool:
        if self._train_time_interval is not None:
            now = time.monotonic()
            late = now - (self._last_time_checked or now) >= self._train_time_interval.total_seconds()
            if trainer.strategy.broadcast(late):
                self._last_time_checked = now
                return True
        every = self._every_n_train_steps
        return every >= 1 and trainer.global_step % every == 0 and trainer.global_step != self._last_global_step_saved

    def _note_score(self, trainer: Trainer) -> None:
        """Mark the state for saving if validation was never as good."""
        if self.monitor is None:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            logged = ", ".join(sorted(trainer.callback_metrics))
            rank_zero_warn(f"no {BEST} is kept: the validation logs no {self.monitor!r}, only {logged}")
            return
        best = self.best_model_score if self._pending_score is None else self._pending_score
        better = best is None or bool(score < best if self.mode == "min" else score > best)
        if trainer.strategy.reduce_boolean_decision(better and bool(score.isfinite())):
            self._pending, self._pending_score = True, score.detach().clone()

    def _save_if_pending(self, trainer: Trainer) -> None:
        if not self._pending or not self._may_save(trainer):
            return
        self._pending = False
        metrics = self._monitor_candidates(trainer)
        path = self.format_checkpoint_name(metrics)
        score, self._pending_score = self._pending_score, None
        if score is not None:
            self._best_step, self.best_model_score, self.best_model_path = trainer.global_step, score, self._path(BEST)
        if score is not None or trainer.global_step != self._last_global_step_saved:
            self._kept = [name for name in self._kept if name != os.path.basename(path)] + [os.path.basename(path)]
            self.last_model_path = self._path(LAST)
            self._save_checkpoint(trainer, path)
            self._alias(trainer, path, LAST)
        if score is not None:
            self._alias(trainer, path, BEST)
        self._remove_old(trainer)
        if self._afterwards is not None:
            self._afterwards(Path(path))

    def _remove_old(self, trainer: Trainer) -> None:
        while len(self._kept) > self.keep:
            self._remove_checkpoint(trainer, self._path(self._kept.pop(0)))

    def _alias(self, trainer: Trainer, path: str, name: str) -> None:
        if trainer.is_global_zero:
            alias_checkpoint(path, name)

    def _log_now(self, trainer: Trainer) -> None:
        """Write the step's row of metrics.csv, which is due after this hook: a crash may come between."""
        unlogged = loop_position.unlogged_metrics(trainer)
        for logger in trainer.loggers:
            if unlogged is not None and isinstance(logger, RunCSVLogger):
                metrics, step = unlogged
                logger.log_metrics(convert_tensors_to_scalars(metrics), step)
