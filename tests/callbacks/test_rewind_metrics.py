from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer

from lightllm.callbacks import Checkpoint, RewindMetrics
from lightllm.loggers import RunCSVLogger

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def fit(folder: Path, steps: int, resume: Path | None = None) -> list[str]:
    checkpoints = Checkpoint(every_n_train_steps=3, keep=10)
    trainer = tiny_trainer(
        folder,
        [RewindMetrics(), checkpoints],
        [RunCSVLogger(folder)],
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=2,
        enable_checkpointing=True,
    )
    trainer.fit(TinyModule(), tiny_loader(tiny_batches(10)), tiny_loader(tiny_batches(2)), ckpt_path=resume)
    return (folder / "metrics.csv").read_text().splitlines()


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_leaves_the_same_file(tmp_path: Path, step: int) -> None:
    whole = fit(tmp_path, 8)
    assert [line.split(",")[0] for line in whole] == ["step", *map(str, range(8))]
    resumed = fit(tmp_path, 8, tmp_path / "checkpoints" / f"step={step}.ckpt")
    assert resumed == whole


def test_a_resumed_run_that_ends_earlier_leaves_no_old_rows(tmp_path: Path) -> None:
    whole = fit(tmp_path, 8)
    resumed = fit(tmp_path, 5, tmp_path / "checkpoints" / "step=3.ckpt")
    assert resumed == whole[:6]


def test_a_new_run_in_an_old_folder_begins_anew(tmp_path: Path) -> None:
    first = fit(tmp_path, 4)
    assert fit(tmp_path, 2) == first[:3]
