"""Where a run stands, as Lightning's loop counters say it. The only file that reads and writes those counters.

Lightning saves its counters as they happen to be in the hook that saves, and guesses from them, when it resumes, which
hook that was. The guess fails where an epoch ends: a batch is trained that never was, a whole epoch or a validation is
left out, or the restored place in the data is not used. Here a checkpoint says one of two things, whichever hook wrote
it: so many batches of an epoch are done (and its validation is due, or not), or an epoch is about to begin; and what
resumes from it goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from torchdata.stateful_dataloader import StatefulDataLoader


def at_optimizer_step(trainer: Trainer) -> bool:
    """Whether no gradient is half accumulated."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def at_last_batch(trainer: Trainer) -> bool:
    """Whether the current batch is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def validation_due(trainer: Trainer) -> bool:
    """Whether a validation follows the current training batch, or is running."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def unlogged_metrics(trainer: Trainer) -> tuple[dict[str, Any], int] | None:
    """The batch's metrics and their step, where Lightning is going to log them after `on_train_batch_end`."""
    connector = trainer._logger_connector
    if not (trainer.training and connector.should_update_logs):
        return None
    metrics = dict(connector.metrics["log"])
    return {"epoch": trainer.current_epoch, **metrics}, trainer.fit_loop.epoch_loop._batches_that_stepped


def logged_step(trainer: Trainer) -> int:
    """The step by which Lightning logs what comes of the current batch; of the next one, before its first."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def record_position(trainer: Trainer, state: dict[str, Any]) -> None:
    """Rewrite the fit loop's state, as it is about to be saved, into one of the two forms.

    Within a batch there is no such position, and the state is left as it is.
    """
    batches, epochs = state["epoch_loop.batch_progress"], state["epoch_progress"]
    done = batches["current"]["processed"]
    if batches["current"]["ready"] != done:
        return
    # An epoch is closed when its end's hooks run, which is also done to one that the last allowed step cuts short.
    closed = epochs["current"]["processed"] == epochs["current"]["started"]
    awaiting_validation = not closed and _before_or_in_validation(trainer, state)
    validation = not closed and validation_due(trainer)
    # Lightning counts a step for the loggers once its validation is over.
    stepped, logged = int(at_optimizer_step(trainer)), state["epoch_loop.state_dict"]

    if done == 0 or (at_last_batch(trainer) and not validation):
        _all_set(epochs, open_epochs=0, finished=0 if closed or done == 0 else 1)
        _all_set(batches, current=0)
        batches["is_last_batch"] = False
        logged["_batches_that_stepped"] += 0 if closed else stepped
        return
    _all_set(epochs, open_epochs=1, finished=-1 if closed else 0)
    _all_set(batches)
    logged["_batches_that_stepped"] -= stepped if closed else 0
    if awaiting_validation and validation:
        # As if the first validation batch had begun: Lightning then validates before it goes on.
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        none = dict.fromkeys(begun, 0)
        state["epoch_loop.val_loop.batch_progress"] = {"total": begun, "current": none, "is_last_batch": False}


def loader_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the training loaders are, in a fit loop's saved state."""
    states: list[dict[str, Any]] = state["state_dict"].get("combined_loader", [])
    return states


def resume_position(trainer: Trainer, states: list[dict[str, Any]]) -> int | None:
    """Go on as if the run had never stopped; to be called in `on_train_start`.

    Args:
        trainer: The trainer, which has read a checkpoint.
        states: What `loader_states` says of that checkpoint.

    Returns:
        The step that the loggers are to be given from the next batch on; None where Lightning's count is right.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if not fit_loop.is_resuming:
        return None
    if epoch_loop.batch_progress.current.ready == 0:
        # An epoch is about to begin. Nothing is resumed within it, so nothing is to be restarted: the loader is asked
        # for a fresh iterator once it knows the epoch's number, and the epoch's first hooks run.
        _go_to_place(fit_loop, states, within_epoch=False)
        fit_loop._restarting = fit_loop._resuming_from_checkpoint = False
        epoch_loop.restarting = False
        fit_loop.reset_restart_stage()
        epoch_loop.reset_restart_stage()
        return None
    _go_to_place(fit_loop, states, within_epoch=True)
    assert fit_loop._data_fetcher is not None
    iter(fit_loop._data_fetcher)
    return epoch_loop._batches_that_stepped + int(at_optimizer_step(trainer))


def set_logged_step(trainer: Trainer, step: int) -> None:
    """Have the loggers be given `step` for the current batch."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def _go_to_place(fit_loop: _FitLoop, states: list[dict[str, Any]], within_epoch: bool) -> None:
    """Have the loaders that can do so go on where they were.

    Lightning does it before it tells them the epoch, and not at all if they were made before the checkpoint was read
    (by `configure_optimizers` asking the trainer how many steps there are) or if an epoch had ended.
    """
    assert fit_loop._combined_loader is not None
    resumable = [loader for loader in fit_loop._combined_loader.flattened if isinstance(loader, _Stateful)]
    for loader, state in zip(resumable, states, strict=True):
        _set_sampler_epoch(loader, fit_loop.trainer.current_epoch)
        # What torchdata's loader remembers of an epoch that is over is that there are no more batches. Loaders that
        # count epochs by themselves have to know that one is over.
        if within_epoch or not isinstance(loader, StatefulDataLoader):
            loader.load_state_dict(state)


def _before_or_in_validation(trainer: Trainer, state: Mapping[str, Any]) -> bool:
    loop = "epoch_loop.val_loop.batch_progress" if trainer.validating else "epoch_loop.batch_progress"
    return bool(state[loop]["current"]["completed"] < state[loop]["current"]["processed"])


def _all_set(progress: dict[str, Any], open_epochs: int = 0, finished: int = 0, current: int | None = None) -> None:
    """Say that everything that was begun is finished, but `open_epochs`, after `finished` more than were counted."""
    for name, counts in progress.items():
        if not isinstance(counts, dict):
            continue
        processed = counts["processed"] + finished if current is None or name == "total" else current
        counts |= dict.fromkeys(("processed", "completed"), processed)
        counts |= dict.fromkeys(("ready", "started"), processed + open_epochs)
