"""A run for real beside what the planner says of it: the same configuration, the peak of its memory, its time."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, Trainer
from measured_memory import peak_allocated
from torch.utils.data import DataLoader

from lightllm.batch import TextBatch
from lightllm.cli.planning import job_of
from lightllm.models import Adapter, FromConfig
from lightllm.modules import CausalPretraining, FineTuning, LanguageModule, Schedule
from lightllm.parallel.machine import Machine
from lightllm.parallel.plan import Job

VOCABULARY = 1000
FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CPU = Machine(kind="cpu", reserve=0.0)


@dataclass(frozen=True)
class Case:
    """What is trained."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    dtype: str = "float32"
    precision: str = "32-true"
    adapter: Adapter | None = None
    recompute: bool = False
    rows: int = 4
    length: int = 128
    document: int | None = None
    accumulate: int = 1
    optimizer: Any = None

    def module(self) -> LanguageModule:
        """The objective, its network not built."""
        common: dict[str, Any] = {
            "optimizer": self.optimizer,
            "schedule": Schedule("constant"),
            "gradient_checkpointing": self.recompute,
        }
        base = {"vocab_size": VOCABULARY} if self.architecture == "gpt2" else FIELDS
        network = FromConfig(self.architecture, base | self.fields, self.dtype)  # type: ignore[arg-type]
        if self.adapter is None:
            return CausalPretraining(network, **common)
        return FineTuning(network, self.adapter, **common)

    def batches(self, count: int, rows: int | None = None) -> list[TextBatch]:
        """Full rows of random tokens, of documents of one length; every position is a target."""
        rows = rows or self.rows
        generator = torch.Generator().manual_seed(0)
        positions = torch.arange(self.length) % (self.document or self.length)
        made = []
        for _ in range(count):
            drawn = torch.randint(VOCABULARY, (rows, self.length + 1), generator=generator)
            made.append(
                TextBatch(
                    input_ids=drawn[:, :-1].contiguous(),
                    labels=drawn[:, 1:].contiguous(),
                    position_ids=positions.repeat(rows, 1),
                    document_ids=torch.arange(rows)[:, None].repeat(1, self.length),
                )
            )
        return made

    def job(self) -> Job:
        """The same for the planner."""
        return job_of(self.module(), self.length, self.document, self.precision, CPU)


class StepClock(Callback):
    """Seconds from the start of one batch to the start of the next."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.marks:
            gc.collect()  # what building left behind in cycles
        self.marks.append(self.clock())


def train(
    case: Case, folder: Path, batches: Sequence[TextBatch], clock: StepClock | None = None, **trainer: Any
) -> StepClock:
    """Train for real; the times of its steps."""
    clock = clock or StepClock()
    torch.manual_seed(0)
    made = Trainer(
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        callbacks=[clock],
        **{
            "accelerator": "cpu",
            "devices": 1,
            "precision": case.precision,
            "accumulate_grad_batches": case.accumulate,
            **trainer,
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # nothing is validated, and loaders have no workers
        made.fit(case.module(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock


def measured_peak(case: Case, folder: Path, **trainer: Any) -> int:
    """Bytes that a run of two optimizer steps allocates at most; batches are there before."""
    batches = case.batches(2 * case.accumulate)
    return peak_allocated(lambda: train(case, folder, batches, **trainer))
