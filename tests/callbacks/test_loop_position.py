from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from resumable_run import BATCH, NotingModule, SaveAt, rows, run, same_state, train_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from lightllm.callbacks import Checkpoint, RandomState

HOOKS = ["on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end"]
VALIDATIONS: list[dict[str, Any]] = [{}, {"validate": True}, {"validate": True, "val_check_interval": 3}]
LENGTHS: list[dict[str, Any]] = [
    {"max_epochs": 3},
    {"max_epochs": -1, "max_steps": 17},
    {"max_epochs": -1, "max_steps": 10, "accumulate_grad_batches": 2},
]


def resumable(folder: Path, hook: str | None = None) -> list[Any]:
    """What makes a run resumable, and something else that saves in `hook`."""
    saving = [] if hook is None else [SaveAt(folder, hook)]
    return [RandomState(), *saving, Checkpoint(every_n_train_steps=1000, dirpath=str(folder / "own"))]


def assert_tail(resumed: NotingModule, whole: NotingModule) -> None:
    """The resumed run saw, did and logged what the whole one did from there on, and ended bitwise the same."""
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert resumed.events == whole.events[len(whole.events) - len(resumed.events) :]
    assert same_state(resumed, whole)
    assert resumed.trainer.global_step == whole.trainer.global_step
    for step, values in resumed.rows.steps.items():
        # The last step before the checkpoint has been logged but for the validation that was still to come.
        assert values == whole.rows.steps[step] or (step == min(resumed.rows.steps) and values < whole.rows.steps[step])


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("validation", VALIDATIONS)
@pytest.mark.parametrize("length", LENGTHS)
def test_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, hook: str, validation: dict[str, Any], length: dict[str, Any]
) -> None:
    fields = {**validation, **length}
    whole = run(tmp_path, resumable(tmp_path, hook), **fields)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert bool(saved) == (hook != "on_validation_end" or bool(validation))
    steps = [step for step in (3, 4, 7, 8, 10, 14, 17, 21) if tmp_path / f"step={step}.ckpt" in saved]
    assert steps or not saved
    for step in steps:
        path = tmp_path / f"step={step}.ckpt"
        resumed = run(tmp_path, resumable(tmp_path / "again"), resume=path, **fields)
        assert_tail(resumed, whole)
        if "accumulate_grad_batches" not in length:
            assert len(resumed.seen) == len(whole.seen) - step
        if resumed.seen:
            assert resumed.trainer.current_epoch == whole.trainer.current_epoch


@pytest.mark.parametrize("validation", VALIDATIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 3}])
def test_finished_run_goes_on_when_it_is_given_more(
    tmp_path: Path, validation: dict[str, Any], accumulate: int, first: dict[str, Any]
) -> None:
    fields = {**validation, "accumulate_grad_batches": accumulate}
    whole = run(tmp_path, resumable(tmp_path / "whole"), **fields)
    begun = run(tmp_path, resumable(tmp_path), **fields, **first)
    resumed = run(tmp_path, resumable(tmp_path), resume=tmp_path / "own" / "last.ckpt", **fields)
    assert begun.seen + resumed.seen == whole.seen
    assert same_state(resumed, whole)


class StopsAfter(Callback):
    """Asks the trainer to stop, as a limit of time or early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("step", [3, 7, 8])
def test_run_that_was_stopped_early_goes_on(tmp_path: Path, validate: bool, step: int) -> None:
    whole = run(tmp_path, resumable(tmp_path / "whole"), validate=validate)
    stopped = run(tmp_path, [StopsAfter(step), *resumable(tmp_path)], validate=validate)
    assert len(stopped.seen) == step
    resumed = run(tmp_path, resumable(tmp_path), resume=tmp_path / "own" / "last.ckpt", validate=validate)
    assert stopped.seen + resumed.seen == whole.seen
    assert same_state(resumed, whole)


class CountingLoader:
    """Counts epochs by itself, like the project's own: each pass is a new epoch, unless a place within one was set."""

    def __init__(self) -> None:
        self.epoch = self.position = 0
        self.fresh = True

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Tensor]:
        if not self.fresh or self.position >= 7:
            self.epoch, self.position = self.epoch + 1, 0
        for index in range(self.position, 7):
            self.position, self.fresh = index + 1, False
            yield torch.full((BATCH, 4), 100 * self.epoch + index)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self.fresh = state["epoch"], state["position"], True


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_loader_that_counts_epochs_itself(tmp_path: Path, hook: str, length: dict[str, Any]) -> None:
    fields = {"validate": True, **length}
    whole = run(tmp_path, resumable(tmp_path, hook), loader=CountingLoader(), **fields)
    assert {rows[0] // 100 for _, _, rows in whole.seen} == {0, 1, 2}
    for path in sorted(tmp_path.glob("*.ckpt"))[:6]:
        resumed = run(tmp_path, resumable(tmp_path / "again"), resume=path, loader=CountingLoader(), **fields)
        assert_tail(resumed, whole)


def test_workers_and_the_end_of_an_epoch(tmp_path: Path) -> None:
    whole = run(tmp_path, resumable(tmp_path, "on_train_batch_end"), max_epochs=2, loader=train_loader(workers=1))
    for step in (6, 7, 8):
        path = tmp_path / f"step={step}.ckpt"
        resumed = run(tmp_path, resumable(tmp_path), resume=path, max_epochs=2, loader=train_loader(workers=1))
        assert len(resumed.seen) == 14 - step
        assert_tail(resumed, whole)


def plain(folder: Path, **fields: Any) -> list[Any]:
    return [ModelCheckpoint(folder, "{step}", save_top_k=-1, **fields)]


def test_lightning_alone_trains_a_batch_that_never_was(tmp_path: Path) -> None:
    """The faults that this module is there for: once these tests fail, Lightning has mended them."""
    loader = DataLoader(rows(), BATCH)  # type: ignore[arg-type]
    fields: dict[str, Any] = {"max_epochs": -1, "max_steps": 15, "loader": loader}
    whole = run(tmp_path, plain(tmp_path, every_n_epochs=1), **fields)
    resumed = run(tmp_path, plain(tmp_path), resume=tmp_path / "step=7.ckpt", **fields)
    assert resumed.seen[0][:2] == (0, 7)
    assert len(resumed.seen) == len(whole.seen[7:])

    whole = run(tmp_path / "ours", [*plain(tmp_path / "ours", every_n_epochs=1), Checkpoint()], **fields)
    resumed = run(tmp_path / "ours", [Checkpoint()], resume=tmp_path / "ours" / "step=7.ckpt", **fields)
    assert resumed.seen == whole.seen[7:]


def test_lightning_alone_leaves_out_an_epoch(tmp_path: Path) -> None:
    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(rows(), BATCH)  # type: ignore[arg-type]

    whole = run(tmp_path, plain(tmp_path, every_n_train_steps=1), loader=loader())
    resumed = run(tmp_path, plain(tmp_path), resume=tmp_path / "step=7.ckpt", loader=loader())
    assert len(whole.seen) == 21
    assert len(resumed.seen) == 7


@pytest.mark.parametrize("step", [3, 7, 10])
def test_place_in_the_data_is_kept_though_the_module_asks_how_many_steps_there_are(tmp_path: Path, step: int) -> None:
    whole = run(tmp_path, [*plain(tmp_path, every_n_train_steps=1), *resumable(tmp_path)], module=NotingModule(True))
    path = tmp_path / f"step={step}.ckpt"

    alone = run(tmp_path, plain(tmp_path / "alone"), resume=path, module=NotingModule(True))
    assert [batch[2] for batch in alone.seen] != [batch[2] for batch in whole.seen[step:]] or step == 7

    resumed = run(tmp_path, resumable(tmp_path / "ours"), resume=path, module=NotingModule(True))
    assert_tail(resumed, whole)
    assert len(resumed.seen) == len(whole.seen) - step
