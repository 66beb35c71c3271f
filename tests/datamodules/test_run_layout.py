from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightllm.datamodules.run_layout import RunLayout, batches_taken, run_layout, splits_to_read


def trainer(**fields: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", **quiet, **({"max_epochs": 1} | fields))


def test_without_a_trainer_one_process_takes_all() -> None:
    assert run_layout(None) == RunLayout(0, 1, 1, 1.0, True, False)


def test_what_a_trainer_decides() -> None:
    layout = run_layout(trainer(accumulate_grad_batches=4, limit_train_batches=7))
    assert layout == RunLayout(accumulate=4, epoch_length=7, bounded=True)
    assert not run_layout(trainer(limit_train_batches=0.5)).bounded
    assert run_layout(trainer(max_epochs=-1, max_steps=3)).bounded
    overfit = run_layout(trainer(overfit_batches=2))
    assert (overfit.epoch_length, overfit.reshuffle) == (2, False)


@pytest.mark.parametrize(("length", "taken"), [(7, 7), (100, 10), (0.55, 5), (1.0, 10)])
def test_batches_taken_are_counted_as_lightning_does(length: float, taken: int) -> None:
    assert batches_taken(length, 10) == taken


@pytest.mark.parametrize(
    ("stage", "has_val", "has_test", "splits"),
    [
        (None, True, True, ["train", "val", "test"]),
        (None, False, False, ["train"]),
        (TrainerFn.FITTING, True, True, ["train", "val"]),
        (TrainerFn.FITTING, False, True, ["train"]),
        (TrainerFn.VALIDATING, True, True, ["val"]),
        (TrainerFn.TESTING, True, True, ["test"]),
        (TrainerFn.PREDICTING, True, True, ["test"]),
        (TrainerFn.PREDICTING, True, False, ["val"]),
        (TrainerFn.VALIDATING, False, True, "nothing to validate on: set data.val"),
        (TrainerFn.TESTING, True, False, "nothing to test on: set data.test"),
        (TrainerFn.PREDICTING, False, False, "nothing to predict on"),
    ],
)
def test_stages_read_what_they_need(
    stage: TrainerFn | None, has_val: bool, has_test: bool, splits: list[str] | str
) -> None:
    run = None if stage is None else trainer()
    if run is not None:
        run.state.fn = stage
    if isinstance(splits, str):
        with pytest.raises(ValueError, match=splits):
            splits_to_read(run, has_val, has_test)
    else:
        assert splits_to_read(run, has_val, has_test) == splits
