"""ProgressBar: loss, tokens per second and time left, in one line."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from typing_extensions import override

TOKENS_PER_SECOND = "throughput/tokens_per_second"


class ProgressBar(LightningProgressBar):
    """Shows the steps of the whole run, the metrics that were logged with `prog_bar=True`, and the time left.

    In a terminal it is one line that changes; where the output is a file or a pipe it prints a line every
    `every_n_steps` optimizer steps and after every validation.

    Args:
        every_n_steps: Optimizer steps from line to line outside a terminal.
        refresh_seconds: Time from one change of the line to the next in a terminal.
    """

    def __init__(self, every_n_steps: int = 10, refresh_seconds: float = 0.25) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.refresh_seconds = refresh_seconds
        self._enabled = True
        self._line: _Line | None = None
        self._total: int | None = None
        self._first_step = 0
        self._began = 0.0
        self._steps_shown = 0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        rich.get_console().print(*args, **kwargs)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._steps_shown = trainer.global_step
        self._began = time.monotonic()
        self._total = total_steps(trainer, steps_before=0, epochs_before=0)
        self._start("train")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Epochs of packed rows differ in length; a run that is resumed within an epoch does not come by here.
        self._total = total_steps(trainer, trainer.global_step, trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._line is None or step == self._steps_shown:
            return
        self._steps_shown = step
        if self._line.is_terminal:
            self._line.show("train", step, self._total, self._numbers(trainer, step), self.refresh_seconds)
        elif step % self.every_n_steps == 0:
            self._line.print("step", step, self._total, self._numbers(trainer, step))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._line is None or trainer.sanity_checking:
            return
        step = trainer.global_step
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop()
        elif not self._line.is_terminal:
            self._line.print("validated at step", step, self._total, self._numbers(trainer, step))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._line is not None and self._line.is_terminal:
            self._line.show("train", trainer.global_step, self._total, self._numbers(trainer, trainer.global_step))
        self._stop()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self.has_dataloader_changed(dataloader_idx)
            self._count("validate", batch_idx + 1, self.total_val_batches_current_dataloader)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._count("test", batch_idx + 1, self.total_test_batches_current_dataloader)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._count("predict", batch_idx + 1, self.total_predict_batches_current_dataloader)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()
        self.reset_dataloader_idx_tracker()

    def _start(self, description: str) -> None:
        if self._enabled and self._line is None:
            self._line = _Line(description)

    def _stop(self) -> None:
        if self._line is not None:
            self._line.stop()
            self._line = None

    def _count(self, description: str, done: int, total: float) -> None:
        """Show batches of a stage that has no steps; only in a terminal."""
        self._start(description)
        if self._line is not None and self._line.is_terminal:
            self._line.show(description, done, int(total) if math.isfinite(total) else None, "", self.refresh_seconds)

    def _numbers(self, trainer: Trainer, step: int) -> str:
        numbers = metrics_text(trainer.progress_bar_metrics)
        left = time_left(time.monotonic() - self._began, step - self._first_step, step, self._total)
        return f"{numbers}, {left} left" if left else numbers


class _Line:
    """The line in the terminal, or lines where there is none."""

    def __init__(self, description: str) -> None:
        self._console = rich.get_console()
        self.is_terminal = self._console.is_terminal
        self._shown_at = -math.inf
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self._progress = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._progress.add_task(description, total=None, numbers="")
            self._progress.start()

    def show(self, description: str, done: int, total: int | None, numbers: str, pause: float = 0.0) -> None:
        """Change the line, unless it changed less than `pause` seconds ago."""
        if self._progress is None or time.monotonic() - self._shown_at < pause:
            return
        self._shown_at = time.monotonic()
        self._progress.update(
            self._task, description=description, completed=done, total=total, numbers=numbers, refresh=True
        )

    def print(self, description: str, done: int, total: int | None, numbers: str) -> None:
        """Add a line."""
        of = f"/{total}" if total is not None else ""
        self._console.print(f"{description} {done}{of}: {numbers}", highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the line as it is."""
        if self._progress is not None:
            self._progress.stop()


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Write metrics for a reader: `loss 2.314, val/loss 2.5, 12,345 tokens/s`."""
    parts = []
    for name, value in metrics.items():
        if name == TOKENS_PER_SECOND:
            parts.append(f"{float(value):,.0f} tokens/s")
        else:
            parts.append(f"{name.removeprefix('train/')} {float(value):.4g}")
    return ", ".join(parts)


def time_left(elapsed: float, steps_taken: int, step: int, total: int | None) -> str | None:
    """Return the time to the last step as `0:01:30`, from the mean of the steps taken; None if nothing is known."""
    if total is None or steps_taken < 1:
        return None
    return str(timedelta(seconds=round(elapsed / steps_taken * max(total - step, 0))))


def total_steps(trainer: Trainer, steps_before: int, epochs_before: int) -> int | None:
    """Optimizer steps of the whole run, if every epoch to come is as long as this one; None if that has no end.

    Args:
        trainer: Whose training loader is set up.
        steps_before: Optimizer steps before this epoch.
        epochs_before: Epochs before this one.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs > 0 and math.isfinite(batches):
        limits.append(steps_before + (epochs - epochs_before) * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(limits, default=None)
