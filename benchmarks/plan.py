"""The planner beside real runs: peak memory of each rank, and whether what it would choose is the fastest.

    python benchmarks/plan.py [--steps 5] [--devices 1 2] [--tokens 2048] [--cpu-time]

A llama of some million weights trains with every spread that this machine's cores allow, the same tokens in every
optimizer step; each is planned for the machine as `--here` measures it. Both sides use one thread a process. Memory is
what torch's own profiler counts, time the fastest step without it. The last lines are JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from measured_memory import peak_allocated
from planned_run import Case, StepClock, train
from ranks import run_on_ranks

from lightllm.cli.planning import job_of
from lightllm.models import LoRA
from lightllm.parallel import ParallelStrategy, PipelineParallelStrategy
from lightllm.parallel.machine import Machine
from lightllm.parallel.machine_here import machine_here
from lightllm.parallel.plan import Estimate, Planner
from lightllm.parallel.plan_layout import Layout

FIELDS = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES = [
    Case("full", fields=FIELDS, length=256),
    Case("full in bfloat16", fields=FIELDS, length=256, dtype="bfloat16"),
    Case("LoRA", fields=FIELDS, length=256, adapter=LoRA(rank=8)),
]


class Found(NamedTuple):
    """One layout, planned and run."""

    case: str
    estimate: Estimate
    peak: int
    """Bytes of the fullest rank."""
    seconds: float
    """Of an optimizer step."""


def strategy(layout: Layout) -> Any:
    """The trainer's."""
    degrees = layout.degrees
    if layout.schedule is not None:
        return PipelineParallelStrategy(degrees.pipeline, layout.microbatches, layout.schedule)
    if degrees.tensor == layout.shard == 1:
        return "auto" if degrees.replicate == 1 else "ddp"
    return ParallelStrategy(degrees.replicate, layout.shard, degrees.tensor)


def run(case: Case, layout: Layout, steps: int, clock: Callable[[], float] | None) -> float:
    """On one rank: the seconds of an optimizer step, or the peak in bytes where there is no clock."""
    in_step = 1 if layout.schedule else layout.microbatches
    rows = layout.rows * (layout.microbatches if layout.schedule else 1)
    case = replace(case, recompute=layout.recompute, accumulate=in_step)
    batches = case.batches(steps * in_step, rows)
    options = {"devices": layout.degrees.num_data_ranks * layout.degrees.tensor * layout.degrees.pipeline}

    def go() -> Any:
        watch = StepClock(clock or time.perf_counter)
        return train(case, Path(tempfile.mkdtemp()), batches, watch, strategy=strategy(layout), **options)

    if clock is None:
        return float(peak_allocated(go))
    marks = go().marks[::in_step]
    return min(later - earlier for earlier, later in pairwise(marks[1:]))


def measured(case: Case, layout: Layout, devices: int, steps: int, clock: Callable[[], float]) -> tuple[int, float]:
    """The peak of the fullest rank, and the time of the slowest."""
    if devices == 1:
        return int(run(case, layout, 2, None)), run(case, layout, steps, clock)
    peak = max(run_on_ranks(run, devices, case, layout, 2, None, seconds=300.0))
    return int(peak), max(run_on_ranks(run, devices, case, layout, steps, clock, seconds=300.0))


def compare(case: Case, machine: Machine, tokens: int, steps: int, clock: Callable[[], float]) -> list[Found]:
    """Plan and run every layout of a case, but for those of micro-batches of many sizes."""
    job = job_of(case.module(), case.length, None, case.precision, machine)
    found = []
    for estimate in Planner(job, machine).rank(tokens):
        layout = estimate.layout
        data_rows = layout.rows * layout.microbatches
        if layout.rows not in (1, data_rows) and not layout.schedule:
            continue
        if layout.schedule and layout.microbatches > 2 * layout.degrees.pipeline:
            continue
        peak, seconds = measured(case, layout, machine.world_size, steps, clock)
        found.append(Found(case.name, estimate, peak, seconds))
        print(
            f"{case.name}, {layout.describe()}, {layout.rows} x {layout.microbatches}"
            f"{', recomputed' if layout.recompute else ''}: peak {peak / 1e6:.1f} MB, "
            f"planned {estimate.memory.peak / peak - 1:+.1%}; {seconds:.3f} s, planned {estimate.time.seconds:.3f} s",
            flush=True,
        )
    return found


def main() -> None:
    """Run all cases, and print how far off the plan is and what its choice costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, where others use the machine too")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    here = machine_here()
    errors, choices = [], {}
    for devices in options.devices:
        machine = replace(here, devices=devices)
        for case in CASES:
            found = compare(case, machine, options.tokens, options.steps, clock)
            errors += [abs(one.estimate.memory.peak / one.peak - 1) for one in found]
            chosen = min(found, key=lambda one: one.estimate.time.seconds)
            fastest = min(one.seconds for one in found)
            choices[f"{case.name}, {devices}"] = round(chosen.seconds / fastest, 3)
    print(json.dumps({"layouts": len(errors), "largest_memory_error": round(max(errors), 3)}))
    print(json.dumps({"chosen_over_fastest": choices}))


if __name__ == "__main__":
    main()
