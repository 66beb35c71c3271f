"""What is said of a run that will not fit, before anything is loaded."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer

from lightllm.cli.memory_warning import layout_of, memory_warning, warn_of_memory
from lightllm.datamodules import Batches, TextData
from lightllm.models import FromConfig
from lightllm.modules import CausalPretraining
from lightllm.parallel import ParallelStrategy, PipelineParallelStrategy
from lightllm.parallel.degrees import Degrees

FIELDS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def module(**fields: int) -> CausalPretraining:
    return CausalPretraining(FromConfig("llama", {**FIELDS, "vocab_size": 500, **fields}))


def data() -> TextData:
    return TextData("nowhere.txt", max_length=128, batches=Batches("packed", tokens=512))


def trainer(**fields: object) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **{"devices": 1, **fields})  # type: ignore[arg-type]


def test_a_run_that_does_not_fit_is_told_by_how_much() -> None:
    told = memory_warning(module(), data(), trainer(), 5e6)
    assert told is not None
    assert "full batches will need about 0.0" in told
    assert "of the 0.00466 GiB that a device has (weights" in told
    assert memory_warning(module(), data(), trainer(), 50e6) is None


def test_a_run_that_fits_this_machine_is_not_spoken_of_and_a_network_that_does_not_is(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        warn_of_memory(module(), data(), trainer())
        assert "will need" not in caplog.text + capsys.readouterr().err
        warn_of_memory(module(num_hidden_layers=400, hidden_size=16384, intermediate_size=50000), data(), trainer())
        assert "full batches will need about" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "degrees", "rows", "microbatches"),
    [
        ("ddp", Degrees(2, 1, 1, 1), 4, 3),
        (ParallelStrategy(), Degrees(1, 2, 1, 1), 4, 3),
        (ParallelStrategy(tensor=2), Degrees(1, 1, 2, 1), 4, 3),
        (PipelineParallelStrategy(2, 4), Degrees(1, 1, 1, 2), 1, 12),
    ],
)
def test_a_trainers_layout(strategy: object, degrees: Degrees, rows: int, microbatches: int) -> None:
    found = layout_of(trainer(devices=2, strategy=strategy, accumulate_grad_batches=3), 4, True)
    assert (found.degrees, found.rows, found.microbatches, found.recompute) == (degrees, rows, microbatches, True)
