from __future__ import annotations

from pathlib import Path

import pytest
from data_run import print_of, ready, text_data
from tiny_objective import Batches
from tiny_run import tiny_trainer

from lightllm.batch import TextBatch
from lightllm.callbacks.calibrating import calibration_batches


def test_draws_from_the_runs_own_data(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [])
    data = ready(text_data(tmp_path))
    trainer.datamodule = data  # type: ignore[attr-defined]
    drawn = calibration_batches(trainer, 5, seed=3)
    assert [print_of(batch) for batch in drawn] == [print_of(batch) for batch in data.calibration_batches(5, seed=3)]


def test_data_of_ones_own_may_have_the_method(tmp_path: Path) -> None:
    class Own(Batches):
        def calibration_batches(self, num_documents: int, seed: int) -> list[TextBatch]:
            return self.train[:num_documents]

    trainer = tiny_trainer(tmp_path, [])
    batch = ready(text_data(tmp_path)).calibration_batches(1)[0]
    trainer.datamodule = Own([batch] * 3)  # type: ignore[attr-defined]
    assert len(calibration_batches(trainer, 2)) == 2


def test_other_data_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [])
    with pytest.raises(ValueError, match="NoneType gives no documents to calibrate on"):
        calibration_batches(trainer, 4)
    trainer.datamodule = Batches([])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"Batches gives no documents.*or take what needs none"):
        calibration_batches(trainer, 4)
