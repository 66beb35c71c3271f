from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_networks import tiny_llama
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer
from typing_extensions import override

from lightllm.callbacks import Throughput
from lightllm.callbacks.throughput import batch_counts, peak_memory
from lightllm.flops import attention_width, step_flops
from lightllm.loggers import RunCSVLogger

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Clock:
    """A clock that moves only when told: training takes 2 s a batch, waiting for data 1 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("lightllm.callbacks.throughput.time.perf_counter", lambda: self.now)


class Slow(Callback):
    """Passes time: in the step, before the next batch, in validation, in saving."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @override
    def on_after_backward(self, *args: Any) -> None:
        self.clock.now += 2.0

    @override
    def on_validation_batch_start(self, *args: Any) -> None:
        self.clock.now += 1000.0


class WaitingLoader:
    def __init__(self, clock: Clock, count: int) -> None:
        self.clock, self.batches = clock, tiny_batches(count)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.clock.now += 1.0
            yield batch


def test_counts_tokens_targets_padding_and_pairs() -> None:
    batch = tiny_batches(1, rows=2, length=8, padding=2)[0]
    # Two documents packed into the second row: positions restart, so pairs are 1 + 2 + 3 and 1 + 2 + 3.
    batch["position_ids"][1] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    batch["labels"][0, 0] = -100
    assert batch_counts(batch).tolist() == [16, 12, 11, 21 + 12]


def test_a_window_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    network = tiny_llama(40, tied=False)
    throughput = Throughput(every_n_steps=3, peak_flops=1e6)
    logger = RunCSVLogger(tmp_path)
    trainer = tiny_trainer(tmp_path, [throughput, Slow(clock)], [logger], accumulate_grad_batches=2)
    trainer.fit(TinyModule(network), WaitingLoader(clock, 12))
    rows = [line.split(",") for line in logger.path.read_text().splitlines()]
    logged = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    # The first optimizer step is warming up, so the first figures are those of steps 2 and 3, 4 batches.
    assert [row["throughput/step_seconds"] for row in logged[:2]] == ["", ""]
    assert [float(row["throughput/step_seconds"]) for row in logged[2:]] == [6.0] * 4
    last = {name: float(value) for name, value in logged[-1].items()}
    assert last["throughput/data_seconds"] == 2.0
    assert last["throughput/compute_seconds"] == 4.0
    assert last["throughput/tokens_per_second"] == pytest.approx(2 * 12 / 6)
    assert last["throughput/target_tokens_per_second"] == pytest.approx(2 * 12 / 6)
    assert last["throughput/padding_share"] == pytest.approx(0.25)
    flops = step_flops(network, network.lm_head.weight, attention_width(network.config))
    assert last["throughput/mfu"] == pytest.approx(flops.total(24, 24, 2 * 42) / 6 / 1e6)
    assert 0.01 < last["throughput/peak_memory_gib"] < 100


def test_validation_and_saving_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Saves(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                clock.now += 5000.0

    logger = RunCSVLogger(tmp_path)
    callbacks = [Throughput(every_n_steps=6, peak_flops=1e6), Slow(clock), Saves()]
    trainer = tiny_trainer(tmp_path, callbacks, [logger], val_check_interval=2)
    trainer.fit(TinyModule(), WaitingLoader(clock, 6), tiny_loader(tiny_batches(1)))
    # Steps 2 to 6 compute; only batches 3 -> and 5 -> 6 were waited for without an interruption.
    assert trainer.callback_metrics["throughput/compute_seconds"] == pytest.approx(2.0)
    assert trainer.callback_metrics["throughput/data_seconds"] == pytest.approx(3 / 5)


def test_the_real_clock(tmp_path: Path) -> None:
    start = time.perf_counter()
    trainer = tiny_trainer(tmp_path, [Throughput(every_n_steps=2)], max_steps=4)
    trainer.fit(TinyModule(), tiny_loader(tiny_batches(4)))
    elapsed = time.perf_counter() - start
    metrics = trainer.callback_metrics
    assert 24 / elapsed < metrics["throughput/tokens_per_second"]
    assert 0 < metrics["throughput/mfu"] < 1
    assert metrics["throughput/step_seconds"] == pytest.approx(
        float(metrics["throughput/data_seconds"] + metrics["throughput/compute_seconds"])
    )


def test_peak_memory_of_a_cpu_is_the_process() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64, 2**20)  # 256 MiB
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) > held.nbytes


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps is at least 1, not 0"):
        Throughput(every_n_steps=0)
