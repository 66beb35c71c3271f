"""Ways to spread a run over a machine: degrees, micro-batches and recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightllm.parallel.degrees import Degrees
from lightllm.parallel.machine import Machine
from lightllm.parallel.network_parts import NetworkParts
from lightllm.parallel.schedules import ScheduleName

SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "interleaved_1f1b")
"""Schedules that are considered: gpipe idles as long as 1f1b and holds more."""


@dataclass(frozen=True)
class Layout:
    """One way to spread a run."""

    degrees: Degrees
    """Resolved."""
    rows: int
    """Of a micro-batch, on one device."""
    microbatches: int
    """Of an optimizer step, on each data rank."""
    recompute: bool
    """Gradient checkpointing."""
    schedule: ScheduleName | None = None
    """Of a pipeline."""

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the weights."""
        assert isinstance(self.degrees.shard, int)
        return self.degrees.shard

    @property
    def chunks(self) -> int:
        """Pieces of the network that each stage of a pipeline has."""
        return 2 if self.schedule == "interleaved_1f1b" else 1

    def describe(self) -> str:
        """A few words: `shard 8 x tensor 4, 2 rows x 4, recomputed`."""
        names = ("replicate", "shard", "tensor", "pipeline")
        degrees = [f"{name} {getattr(self.degrees, name)}" for name in names if getattr(self.degrees, name) != 1]
        schedule = f" ({self.schedule})" if self.schedule else ""
        return " x ".join(degrees) + schedule if degrees else "one device"


def layouts(
    parts: NetworkParts, machine: Machine, step_rows: int, schedules: tuple[ScheduleName, ...] = SCHEDULES
) -> Iterator[Layout]:
    """Every sensible layout of a network on a machine.

    Ranks of a tensor-parallel group are within a node; a sharded copy of the weights takes a node or all data ranks;
    rows of a micro-batch are powers of two, or all rows of a device.

    Args:
        parts: The network's.
        machine: All of its devices are used.
        step_rows: Rows of an optimizer step, of all data ranks.
        schedules: Of pipelines.
    """
    for tensor in _divisors(machine.devices):
        if tensor > 1 and (not parts.dividends or any(size % tensor for size in parts.dividends)):
            continue
        for pipeline in _divisors(machine.world_size // tensor):
            data = machine.world_size // tensor // pipeline
            if pipeline > len(parts.blocks) or step_rows % data:
                continue
            for shard in sorted({1, data, _within_node(machine, tensor, data)} if pipeline == 1 else {1, data}):
                degrees = Degrees(data // shard, shard, tensor, pipeline)
                yield from _cut(degrees, len(parts.blocks), step_rows // data, schedules)


def _cut(degrees: Degrees, num_blocks: int, rows: int, schedules: tuple[ScheduleName, ...]) -> Iterator[Layout]:
    """All ways to cut the rows that a data rank takes in a step into micro-batches."""
    for size in _divisors(rows):
        if size & (size - 1) and size != rows:
            continue
        microbatches = rows // size
        for recompute in (False, True):
            if degrees.pipeline == 1:
                yield Layout(degrees, size, microbatches, recompute)
                continue
            for schedule in schedules:
                layout = Layout(degrees, size, microbatches, recompute, schedule)
                enough = microbatches >= degrees.pipeline and degrees.pipeline * layout.chunks <= num_blocks
                if enough and (layout.chunks == 1 or microbatches % degrees.pipeline == 0):
                    yield layout


def _within_node(machine: Machine, tensor: int, data: int) -> int:
    size = max(1, machine.devices // tensor)
    return size if data % size == 0 else 1


def _divisors(number: int) -> list[int]:
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})
