from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from resumable_run import NotingModule, run
from torch import Tensor
from typing_extensions import override

from lightllm.callbacks import Checkpoint, RandomState
from lightllm.checkpoint_io import AtomicCheckpointIO
from lightllm.loggers import RunCSVLogger


class Saves(Callback):
    """Notes (optimizer steps, batches of the epoch, accumulating) at every save."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool]] = []

    @property
    def steps(self) -> list[int]:
        return [step for step, _, _ in self.seen]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.seen.append((trainer.global_step, batches, trainer.fit_loop._should_accumulate()))


class ScoredModule(NotingModule):
    """Validation gives the scores it is told to."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = iter(scores)

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    @override
    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/loss", next(self.scores))


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def step_of(folder: Path, name: str) -> int:
    return int(torch.load(folder / "checkpoints" / name, weights_only=True)["global_step"])


def test_saves_every_so_many_steps_and_at_the_end_and_keeps_the_newest(tmp_path: Path) -> None:
    saves = Saves()
    run(tmp_path, [saves, RandomState(), Checkpoint(every_n_train_steps=4)])
    assert saves.steps == [4, 8, 12, 16, 20, 21]
    assert names(tmp_path) == {"step=21.ckpt", "last.ckpt"}
    assert step_of(tmp_path, "last.ckpt") == 21


def test_keeps_as_many_as_asked_for(tmp_path: Path) -> None:
    run(tmp_path, [RandomState(), Checkpoint(every_n_train_steps=4, keep=3)])
    assert names(tmp_path) == {"step=16.ckpt", "step=20.ckpt", "step=21.ckpt", "last.ckpt"}


def test_default_saves_at_the_end_of_a_short_run(tmp_path: Path) -> None:
    run(tmp_path, [Checkpoint()])
    assert names(tmp_path) == {"step=21.ckpt", "last.ckpt"}


def test_saves_at_the_end_of_epochs(tmp_path: Path) -> None:
    saves = Saves()
    run(tmp_path, [saves, Checkpoint(every_n_epochs=2)])
    assert saves.steps == [14, 21]


def test_saves_every_so_often(tmp_path: Path) -> None:
    saves = Saves()
    run(tmp_path, [saves, Checkpoint(train_time_interval=timedelta(seconds=0))], max_epochs=1)
    assert saves.steps == [1, 2, 3, 4, 5, 6, 7]
    never = Saves()
    run(tmp_path, [never, Checkpoint(train_time_interval=timedelta(hours=1))], max_epochs=1)
    assert never.steps == [7]


@pytest.mark.parametrize("accumulate", [2, 3])
def test_never_saves_amid_an_accumulation(tmp_path: Path, accumulate: int) -> None:
    saves = Saves()
    scores = [float(-n) for n in range(30)]  # always better: each validation wants a checkpoint
    run(
        tmp_path,
        [saves, Checkpoint(every_n_train_steps=1)],
        module=ScoredModule(scores),
        validate=True,
        val_check_interval=1,
        accumulate_grad_batches=accumulate,
    )
    assert saves.seen
    assert not any(accumulating for _, _, accumulating in saves.seen)
    assert all(batches % accumulate == 0 or batches == 7 for _, batches, _ in saves.seen)
    assert saves.steps == sorted(set(saves.steps))  # and each step once


def test_best_is_the_one_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    scores = [5.0, 3.0, float("nan"), 4.0, float("-inf"), 3.0, 3.5, 9.0, 9.0]
    checkpoint = Checkpoint()
    run(tmp_path, [checkpoint], module=ScoredModule(scores), validate=True, val_check_interval=2)
    assert names(tmp_path) == {"step=21.ckpt", "last.ckpt", "best.ckpt"}
    assert step_of(tmp_path, "best.ckpt") == 4
    assert checkpoint.best_model_path == str(tmp_path / "checkpoints" / "best.ckpt")
    assert checkpoint.best_model_score == 3.0


def test_best_may_be_the_highest_and_of_the_last_batch_of_an_epoch(tmp_path: Path) -> None:
    checkpoint = Checkpoint(mode="max")
    run(tmp_path, [checkpoint], module=ScoredModule([1.0, 2.0, 1.0]), validate=True)
    assert step_of(tmp_path, "best.ckpt") == 14


def test_metric_that_is_not_logged_is_said_and_no_best_is_kept(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no best.ckpt is kept: the validation logs no 'val/perplexity', only"):
        run(tmp_path, [Checkpoint(monitor="val/perplexity")], validate=True)
    run(tmp_path / "none", [Checkpoint(monitor=None)], validate=True)
    assert names(tmp_path / "none") == {"step=21.ckpt", "last.ckpt"}


def test_resumed_run_remembers_what_is_best_and_what_it_may_remove(tmp_path: Path) -> None:
    options: dict[str, Any] = {"validate": True, "val_check_interval": 7}
    run(tmp_path, [Checkpoint(every_n_train_steps=5)], module=ScoredModule([2.0, 4.0]), max_epochs=2, **options)
    assert names(tmp_path) == {"step=14.ckpt", "last.ckpt", "best.ckpt"}
    newest = tmp_path / "checkpoints" / "step=14.ckpt"
    resumed = Checkpoint(every_n_train_steps=6)  # another interval: the same run all the same
    run(tmp_path, [resumed], module=ScoredModule([3.0]), resume=newest, **options)
    assert step_of(tmp_path, "best.ckpt") == 7
    assert resumed.best_model_score == 2.0
    assert names(tmp_path) == {"step=21.ckpt", "last.ckpt", "best.ckpt"}


def test_crash_between_saving_the_best_and_naming_it_is_mended(tmp_path: Path) -> None:
    run(tmp_path, [Checkpoint()], module=ScoredModule([2.0, 1.0]), max_epochs=2, validate=True)
    folder = tmp_path / "checkpoints"
    (folder / "best.ckpt").unlink()
    AtomicCheckpointIO().save_checkpoint({"global_step": 7}, folder / "best.ckpt")
    newest = folder / "step=14.ckpt"
    run(tmp_path, [Checkpoint()], module=ScoredModule([3.0]), resume=newest, validate=True)
    assert step_of(tmp_path, "best.ckpt") == 14


def test_best_of_another_run_is_not_that_of_this_one(tmp_path: Path) -> None:
    run(tmp_path / "old", [Checkpoint()], module=ScoredModule([2.0, 1.0]), max_epochs=2, validate=True)
    before = names(tmp_path / "old")
    path = tmp_path / "old" / "checkpoints" / "step=14.ckpt"
    run(tmp_path / "new", [Checkpoint()], module=ScoredModule([3.0]), resume=path, validate=True)
    assert step_of(tmp_path / "new", "best.ckpt") == 21
    assert names(tmp_path / "old") == before


def test_files_are_written_atomically_and_leftovers_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step=3.ckpt.tmp-12345").write_bytes(b"half")
    module = run(tmp_path, [Checkpoint()], max_epochs=1)
    assert isinstance(module.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert names(tmp_path) == {"step=7.ckpt", "last.ckpt"}


def test_file_name_may_name_metrics(tmp_path: Path) -> None:
    run(tmp_path, [Checkpoint(filename="{epoch}-{step}", dirpath=str(tmp_path / "checkpoints"))])
    assert names(tmp_path) == {"epoch=3-step=21.ckpt", "last.ckpt"}


def test_trial_run_saves_nothing(tmp_path: Path) -> None:
    run(tmp_path, [Checkpoint(every_n_train_steps=1)], validate=True, fast_dev_run=3)
    assert not (tmp_path / "checkpoints").exists()


def test_something_has_to_be_kept() -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoint(keep=0)


class Requests(Callback):
    """Asks for a checkpoint after a batch, and stops the run when it is there."""

    def __init__(self, checkpoint: Checkpoint, batch: int) -> None:
        self.checkpoint = checkpoint
        self.batch = batch
        self.paths: list[Path] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            self.checkpoint.request(self.paths.append)


@pytest.mark.parametrize(("batch", "accumulate", "step"), [(3, 1, 3), (3, 2, 2), (7, 1, 7), (6, 3, 2), (2, 1, 2)])
@pytest.mark.parametrize("validate", [False, True])
def test_requested_checkpoint_comes_with_the_optimizer_step(
    tmp_path: Path, batch: int, accumulate: int, step: int, validate: bool
) -> None:
    checkpoint = Checkpoint(keep=100, monitor=None)
    requests = Requests(checkpoint, batch)
    run(tmp_path, [checkpoint, requests], max_epochs=2, accumulate_grad_batches=accumulate, validate=validate)
    assert requests.paths[0] == tmp_path / "checkpoints" / f"step={step}.ckpt"
    assert step_of(tmp_path, requests.paths[0].name) == step


class DiesAfterSaving(Callback):
    """Breaks the run off as soon as a checkpoint of a step is written, before anything else happens."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        io, write, step = trainer.strategy.checkpoint_io, AtomicCheckpointIO.save_checkpoint, self.step

        def save_and_die(checkpoint: dict[str, Any], path: Path, storage_options: object = None) -> None:
            write(AtomicCheckpointIO(), checkpoint, path)
            if checkpoint["global_step"] == step:
                raise RuntimeError("died")

        io.save_checkpoint = save_and_die  # type: ignore[method-assign]


def test_metrics_of_a_saved_step_are_on_disk_before_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died"):
        run(tmp_path, [DiesAfterSaving(3), Checkpoint(every_n_train_steps=3)], logger=RunCSVLogger(tmp_path))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "0", "1", "2"]
    assert "train/loss" in lines[0]
    assert all(line.split(",")[lines[0].split(",").index("train/loss")] for line in lines[1:])
