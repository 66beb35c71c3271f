"""Two processes of one thread each beside one process of one thread: what each way of spreading a run gains.

    python benchmarks/parallel.py [--steps 8] [--only pipeline] [--cores 0,1]

Every way trains the same llama on the same tokens an optimizer step, under the Trainer. `waits` is the share of the
time in which the thread that trains has nothing to do: it waits for the other process, or for what is on the wire. For
pipelines, the same within a schedule is what its formula calls the bubble, (ranks - 1) / (stages a rank * micro-batches
+ ranks - 1), plus the wire and whatever stages differ in. Each process needs a core of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.utils.data import DataLoader

from lightllm.batch import TextBatch
from lightllm.models import FromConfig
from lightllm.modules import CausalPretraining, Schedule
from lightllm.parallel import ParallelStrategy, PipelineParallelStrategy
from lightllm.parallel.data_ranks import num_data_ranks
from lightllm.parallel.schedules import ScheduleName, TrainingSchedule

VOCABULARY, ROWS, LENGTH = 2048, 16, 64
FIELDS = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "num_hidden_layers": 8}
SCHEDULES: list[tuple[ScheduleName, int]] = [
    *(("gpipe", count) for count in (2, 4, 8, 16)),
    *(("1f1b", count) for count in (4, 8, 16)),
    ("interleaved_1f1b", 8),
    ("zero_bubble", 8),
    ("zbv", 8),
]


def ways() -> dict[str, Any]:
    """What makes each strategy, by name; None is one process."""
    spread = {
        "ddp": DDPStrategy,
        "fsdp2": ParallelStrategy,
        "tensor": lambda: ParallelStrategy(tensor=2),
    }
    staged = {
        f"pipeline {name} {count}": lambda name=name, count=count: PipelineParallelStrategy(2, count, name)
        for name, count in SCHEDULES
    }
    return {"one": None, **spread, **staged}


def batch(rows: int, seed: int) -> TextBatch:
    """One batch of random tokens."""
    tokens = torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return TextBatch(
        input_ids=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        position_ids=torch.arange(LENGTH).expand(rows, LENGTH).contiguous(),
        document_ids=torch.arange(rows)[:, None].expand(rows, LENGTH).contiguous(),
    )


class Clock(Callback):
    """Seconds of each optimizer step, on the wall and at work in the thread that trains."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Mark both times."""
        self.marks.append((time.perf_counter(), time.thread_time()))

    def steps(self) -> list[tuple[float, float]]:
        """Wall and work of each step but the first two and the last."""
        pairs = zip(self.marks[2:], self.marks[3:], strict=False)
        return [(later[0] - earlier[0], later[1] - earlier[1]) for earlier, later in pairs]


def within_schedules() -> list[tuple[float, float]]:
    """Have every pass of a pipeline's schedule note its wall and work from now on; where they are noted."""
    noted: list[tuple[float, float]] = []
    run = TrainingSchedule.run

    def timed(schedule: TrainingSchedule) -> None:
        began = time.perf_counter(), time.thread_time()
        run(schedule)
        noted.append((time.perf_counter() - began[0], time.thread_time() - began[1]))

    TrainingSchedule.run = timed  # type: ignore[method-assign]
    return noted


def train(strategy: Strategy | None, steps: int, folder: Path) -> dict[str, float]:
    """Train on this rank; medians of its steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    noted, clock = within_schedules(), Clock()
    module = CausalPretraining(
        FromConfig("llama-10m", FIELDS),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        schedule=Schedule("constant"),
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1 if strategy is None else 2,
        strategy="auto" if strategy is None else strategy,
        default_root_dir=folder,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    rows = ROWS // (num_data_ranks(strategy) if isinstance(strategy, DDPStrategy) else 1)
    if isinstance(strategy, ParallelStrategy):
        rows = ROWS // (2 // strategy.degrees.tensor)
    trainer.fit(module, DataLoader([batch(rows, seed) for seed in range(steps)], batch_size=None))  # type: ignore[arg-type]
    wall, work = (statistics.median(values) for values in zip(*clock.steps(), strict=True))
    found = {"seconds": wall, "waits": max(0.0, 1 - work / wall)}
    if noted:
        wall, work = (statistics.median(values) for values in zip(*noted[2:], strict=True))
        found["idle"] = max(0.0, 1 - work / wall)
    return found


def be_rank(name: str, rank: int, port: int, options: argparse.Namespace, folder: Path) -> None:
    """Be one of two processes, on a core of its own."""
    warnings.simplefilter("ignore")
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
    make = ways()[name]
    if make is not None:
        os.environ |= {key: str(value) for key, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "benchmark", "GLOO_SOCKET_IFNAME": "lo"}
    if options.cores:
        os.sched_setaffinity(0, {options.cores[rank]})
    found = train(None if make is None else make(), options.steps, folder)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one way in fresh processes; the slower rank's step, and the mean of what both waited."""
    with tempfile.TemporaryDirectory() as name_of_folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        folder = Path(name_of_folder)
        count = 1 if name == "one" else 2
        context = get_context("fork")
        ranks = [context.Process(target=be_rank, args=(name, rank, port, options, folder)) for rank in range(count)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert not any(rank.exitcode for rank in ranks), f"{name} failed"
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    result = {"tokens_per_second": ROWS * LENGTH / max(one["seconds"] for one in found)}
    result |= {key: statistics.mean(one[key] for one in found) for key in ("waits", "idle") if key in found[0]}
    return result


def main() -> None:
    """Run all ways, each beside the one process before it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="ways whose names begin so, beside the one process")
    parser.add_argument("--cores", type=lambda text: [int(one) for one in text.split(",")], default=[])
    options = parser.parse_args()
    made, results = ways(), {}
    for name in [one for one in made if one == "one" or one.startswith(options.only)]:
        found = results[name] = measure(name, options)
        found["ratio"] = found["tokens_per_second"] / results["one"]["tokens_per_second"]
        if name.startswith("pipeline"):
            found["formula"] = made[name]().plan.bubble()
        print(f"{name:28}", {key: round(value, 3) for key, value in found.items()}, flush=True)
    print(json.dumps({name: {key: round(one[key], 4) for key in one} for name, one in results.items()}))


if __name__ == "__main__":
    main()
