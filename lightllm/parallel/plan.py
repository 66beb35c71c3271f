"""The planner: every sensible way to spread a job over a machine, with what it holds and how long it takes, ranked.

Nothing is trained and nothing is allocated: the network is on the meta device, one block of it is run on fake tensors,
and the rest is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightllm.models.adapters import Adapter
from lightllm.models.anatomy import output_head
from lightllm.parallel.block_profile import MicroBatch, NetworkProfile, profile
from lightllm.parallel.loss_buffers import LossBuffers, loss_buffers
from lightllm.parallel.machine import GIB, Machine
from lightllm.parallel.network_parts import NetworkParts, network_parts
from lightllm.parallel.one_block import one_block
from lightllm.parallel.plan_layout import Layout, layouts
from lightllm.parallel.plan_memory import MemoryEstimate, MemoryModel, OptimizerCost, ranks
from lightllm.parallel.plan_time import StepTime, TimeModel


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Args:
        bare: The network without its adapter, on the meta device.
        adapter: What is attached to it.
        length: Positions in a row.
        document: Positions of a document: the row's, where it holds one.
        optimizer: What the optimizer holds.
        autocast: The type of products under mixed precision.
        is_compiled: Whether blocks are compiled.
        low_bit: Bytes of a frozen weight that is stored in few bits.
    """

    bare: nn.Module
    adapted: nn.Module
    adapter: Adapter
    length: int
    document: int
    optimizer: OptimizerCost
    autocast: torch.dtype | None = None
    is_compiled: bool = False
    low_bit: float | None = None


class Estimate(NamedTuple):
    """A layout with what it takes."""

    layout: Layout
    memory: MemoryEstimate
    """Of the fullest rank."""
    time: StepTime
    fits: bool
    tokens_per_second: float
    """Of each device."""


class Planner:
    """Estimates of one job on one machine.

    Args:
        job: What is to be trained.
        machine: Where.
    """

    def __init__(self, job: Job, machine: Machine) -> None:
        self.job = job
        self.machine = machine
        self.parts: NetworkParts = network_parts(job.adapted, job.low_bit)
        self._head = output_head(job.adapted)
        weights = self._head.weight.dtype
        self._dtype = job.autocast or weights
        # On GPUs, mixed precision of sharded weights is to gather them in the narrow type: see `plan_overlay`.
        self.gathered = job.autocast if machine.kind == "cuda" and job.low_bit is None else None
        share = 1.0 if self.gathered is None else self.gathered.itemsize / weights.itemsize
        self._memory = MemoryModel(self.parts, job.optimizer, share)
        name = str(self._dtype).removeprefix("torch.")
        self._time = TimeModel(machine, self.parts, job.optimizer, name, share, job.is_compiled)
        self._profiles: dict[tuple[int, int, bool], NetworkProfile] = {}

    def rank(self, step_tokens: int) -> list[Estimate]:
        """All sensible layouts, those that fit first, the fastest of them first.

        Args:
            step_tokens: Of an optimizer step, of all devices; rounded to whole rows.

        Raises:
            ValueError: No layout takes so many rows.
        """
        rows = max(1, round(step_tokens / self.job.length))
        found = [self.estimate(layout) for layout in layouts(self.parts, self.machine, rows)]
        if not found:
            raise ValueError(
                f"{rows} rows of {self.job.length} tokens in an optimizer step do not divide among "
                f"{self.machine.world_size} devices in any way: set --target_batch_tokens to a multiple of "
                f"{self.machine.world_size * self.job.length}"
            )
        return sorted(found, key=lambda one: (not one.fits, -one.tokens_per_second if one.fits else one.memory.peak))

    def estimate(self, layout: Layout) -> Estimate:
        """What one layout takes."""
        found = self.profile(layout)
        loss = self.loss(layout)
        stages = ranks(layout, len(self.parts.blocks))
        memory = max((self._memory.estimate(layout, one, found, loss) for one in stages), key=lambda one: one.peak)
        time = self._time.estimate(layout, stages, found, self._loss_seconds(layout))
        tokens = layout.rows * layout.microbatches * self.job.length * layout.degrees.num_data_ranks
        speed = tokens / time.seconds / self.machine.world_size
        return Estimate(layout, memory, time, memory.peak <= self.machine.usable_bytes, speed)

    def profile(self, layout: Layout) -> NetworkProfile:
        """Of a micro-batch on one rank; found once for each size."""
        gathered = self.gathered if layout.shard > 1 else None
        key = layout.rows, layout.degrees.tensor, gathered is not None
        if key not in self._profiles:
            job, low_bit = self.job, self.job.low_bit is not None
            make = one_block(job.bare, job.adapter, layout.degrees.tensor, low_bit, gathered)
            batch = MicroBatch(layout.rows, job.length, job.document)
            autocast = job.autocast if gathered is None else None
            self._profiles[key] = profile(make, batch, autocast, self.machine.kind == "cpu")
        return self._profiles[key]

    def loss(self, layout: Layout) -> LossBuffers:
        """Buffers of the loss of a micro-batch; every position is taken for a target."""
        vocab, width = self._head.weight.shape
        count = layout.rows * self.job.length
        with FakeTensorMode():
            device = "cpu" if self.machine.kind == "cpu" else "meta"
            dtype = self._head.weight.dtype
            if self.gathered is not None and layout.shard > 1:
                dtype = self.gathered
            head = torch.empty(vocab // layout.degrees.tensor, width, dtype=dtype, device=device)
            head.requires_grad_(self._head.weight.requires_grad)
            return loss_buffers(count, count, head, dtype, self._dtype, num_parts=layout.degrees.tensor)

    def _loss_seconds(self, layout: Layout) -> float:
        vocab, width = self._head.weight.shape
        count, share = layout.rows * self.job.length, layout.degrees.tensor
        trains = self._head.weight.requires_grad
        return self._time.loss_seconds(count, vocab // share, width, trains, self._dtype.itemsize)


def reason(estimate: Estimate, machine: Machine) -> str:
    """Why an estimate is where it is: what does not fit, or what a step is spent on beside computing."""
    memory, time = estimate.memory, estimate.time
    if not estimate.fits:
        parts = {name: getattr(memory, name) for name in ("weights", "optimizer", "gradients", "activations", "loss")}
        most = max(parts, key=lambda name: parts[name])
        return (
            f"does not fit: {memory.peak / GIB:.3g} GiB of {machine.usable_bytes / GIB:.3g} "
            f"({most} {parts[most] / GIB:.3g})"
        )
    shares = {
        "recomputed": time.recompute,
        "exchanged": time.exposed,
        "idle in the pipeline": time.bubble,
        "optimizer": time.optimizer,
    }
    told = [f"{value / time.seconds:.0%} {name}" for name, value in shares.items() if value > 0.02 * time.seconds]
    return ", ".join(told) or "computes nearly all the time"
