"""What the trainer, logging and callbacks cost over the bare step, at about 100 ms a step.

    python benchmarks/overhead.py [--steps 100]

The bare side does what a step is: batch, forward, loss, backward, gradient scale, optimizer. The other side is the
Trainer with everything that a run of the command line has: checkpoints, metrics.csv, throughput, random state,
progress. Both run in one process, in turns, on the same module and batches; medians of the steps are compared, so
that what happens every step counts and a checkpoint now and then does not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightllm.batch import TextBatch
from lightllm.callbacks import (
    Checkpoint,
    Interruption,
    NonFiniteLoss,
    ProgressBar,
    RandomState,
    RewindMetrics,
    Throughput,
)
from lightllm.loggers import loggers
from lightllm.models import FromConfig
from lightllm.modules import CausalPretraining, Schedule
from lightllm.modules.heap import keep_freed_memory

VOCABULARY, ROWS, LENGTH = 2048, 2, 96


def batch(seed: int) -> TextBatch:
    """One batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    return TextBatch(
        input_ids=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        position_ids=torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous(),
        document_ids=torch.arange(ROWS)[:, None].expand(ROWS, LENGTH).contiguous(),
    )


def module() -> CausalPretraining:
    """The objective that both sides train."""
    torch.manual_seed(0)
    return CausalPretraining(
        FromConfig("llama-10m", {"vocab_size": VOCABULARY}),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        schedule=Schedule("constant"),
    )


def bare(batches: list[TextBatch]) -> list[float]:
    """Seconds of each bare step."""
    keep_freed_memory()  # the Trainer's side does, and it is no part of the overhead
    one = module()
    one.configure_model()
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-4, fused=True)
    seconds = []
    for each in batches:
        began = time.perf_counter()
        loss = one.criterion(one(each), each)
        (loss.sum / loss.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


class StepClock(Callback):
    """Seconds from the start of one batch to the start of the next: everything that a step costs."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Mark the time."""
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step but the last."""
        return [later - earlier for earlier, later in zip(self.marks, self.marks[1:], strict=False)]


def under_trainer(batches: list[TextBatch], log_every: int) -> list[float]:
    """Seconds of each step under the Trainer with what every run has."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            default_root_dir=folder,
            logger=loggers(["csv"], folder),  # type: ignore[arg-type]
            log_every_n_steps=log_every,
            enable_model_summary=False,
            callbacks=[
                clock,
                Checkpoint(every_n_train_steps=50),
                Throughput(),
                RandomState(),
                RewindMetrics(),
                NonFiniteLoss(),
                Interruption(),
                ProgressBar(),
            ],
        )
        trainer.fit(module(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock.seconds


def main() -> None:
    """Run both sides in turns and print what the Trainer adds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=5)
    options = parser.parse_args()
    batches = [batch(seed) for seed in range(options.steps)]
    bare(batches[:5])
    sides: dict[str, list[float]] = {"bare": [], "trainer": []}
    for _ in range(3):
        sides["bare"] += bare(batches)[3:]
        sides["trainer"] += under_trainer(batches, options.log_every)[3:]
    medians = {name: statistics.median(seconds) for name, seconds in sides.items()}
    print({name: f"{1000 * value:.2f} ms a step" for name, value in medians.items()})
    print(json.dumps({"overhead_fraction": round(medians["trainer"] / medians["bare"] - 1, 4)}))


if __name__ == "__main__":
    main()
