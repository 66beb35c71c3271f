"""What is said of a run that will not fit, before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from lightllm.cli.memory_warning import is_planned, layout_of, memory_warning, warn_of_memory
from lightllm.datamodules import Batches, TextData
from lightllm.models import FromConfig
from lightllm.models.adapters import Full, LoRA
from lightllm.modules import CausalPretraining, FineTuning
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


LARGE = {"num_hidden_layers": 400, "hidden_size": 16384, "intermediate_size": 50000}


def said(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> str:
    return caplog.text + capsys.readouterr().err


def test_a_run_on_the_processor_is_measured_by_its_memory_whatever_gpu_is_beside_it(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_processor = trainer()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1))
    with caplog.at_level("INFO"):
        warn_of_memory(module(), data(), of_processor)
    assert "will need" not in said(caplog, capsys)


def test_of_strategies_that_the_planner_does_not_know_nothing_is_said(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    spread = trainer()
    spread._accelerator_connector.strategy = FSDPStrategy(
        accelerator=CPUAccelerator()
    )  # with which a trainer asks for GPUs
    with caplog.at_level("INFO"):
        warn_of_memory(module(**LARGE), data(), spread)
    assert "will need" not in said(caplog, capsys)


def test_which_strategies_the_planner_knows() -> None:
    for known in ("auto", "ddp", ParallelStrategy(), PipelineParallelStrategy(2, 4)):
        assert is_planned(trainer(devices=2 if known != "auto" else 1, strategy=known).strategy)
    assert not is_planned(FSDPStrategy())
    assert not is_planned(DeepSpeedStrategy.__new__(DeepSpeedStrategy))  # which asks for its package when it is made


class UnusualAdapter(Full):
    """A user's, which takes the networks of its own project only."""

    def attach(self, network: nn.Module) -> nn.Module:
        raise KeyError("projection")


def test_the_runs_random_numbers_are_those_without_the_estimate() -> None:
    tuned = FineTuning(FromConfig("llama", {**FIELDS, "vocab_size": 500}), LoRA(rank=2))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    warn_of_memory(tuned, data(), trainer())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fault_of_the_estimate_ends_no_run() -> None:
    tuning = FineTuning(FromConfig("llama", {**FIELDS, "vocab_size": 500}), UnusualAdapter())
    with pytest.raises(KeyError, match="projection"):
        memory_warning(tuning, data(), trainer(), memory=1e9)
    warn_of_memory(tuning, data(), trainer())
