"""How long a training step takes: products and moved bytes on each device, exchanges, and waiting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightllm.parallel.block_profile import NetworkProfile
from lightllm.parallel.collectives import Group, all_gather_seconds, all_reduce_seconds, send_seconds
from lightllm.parallel.machine import Machine
from lightllm.parallel.network_parts import NetworkParts, Weights
from lightllm.parallel.operation_meter import Operation
from lightllm.parallel.plan_layout import Layout
from lightllm.parallel.plan_memory import OptimizerCost, Rank

FUSED = 0.5
"""What `torch.compile` leaves of the bytes that move outside of products, about."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step; they add up to all of it."""

    compute: float
    recompute: float
    exposed: float
    """Exchanges that nothing is computed beside."""
    bubble: float
    """Devices of a pipeline without work."""
    optimizer: float
    exchanged: float
    """Bytes that a device receives; no part of the sum."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.recompute + self.exposed + self.bubble + self.optimizer


class TimeModel:
    """The arithmetic of one job on one machine.

    Args:
        machine: The machine.
        parts: The network's parameters.
        optimizer: What the optimizer holds, all of which it reads and writes.
        dtype: The type of products, by name.
        gathered_share: Bytes of a gathered weight over those of its shard.
        is_compiled: Whether blocks are compiled.
    """

    def __init__(
        self,
        machine: Machine,
        parts: NetworkParts,
        optimizer: OptimizerCost,
        dtype: str,
        gathered_share: float = 1.0,
        is_compiled: bool = False,
    ) -> None:
        self._machine = machine
        self._parts = parts
        self._optimizer = optimizer
        self._dtype = dtype
        self._gathered_share = gathered_share
        self._is_compiled = is_compiled

    def device_seconds(self, operations: Iterable[Operation]) -> float:
        """How long a device takes for operations, one after another."""
        rate = self._machine.rate(self._dtype)
        busy, count = 0.0, 0
        for operation in operations:
            product = operation.flops > 0
            moved = operation.moved * (1.0 if product or not self._is_compiled else FUSED)
            busy += max(operation.flops / rate, self._machine.move_seconds(moved))
            count += 1
        starts = count * self._machine.start * 1e-6
        return busy + starts if self._machine.kind == "cpu" else max(busy, starts)

    def estimate(self, layout: Layout, stages: list[Rank], profile: NetworkProfile, loss_seconds: float) -> StepTime:
        """Seconds of an optimizer step.

        Args:
            layout: How the run is spread.
            stages: Of the pipeline, or one rank.
            profile: Of a micro-batch on a rank of the layout's tensor degree.
            loss_seconds: Of the loss of a micro-batch, forward and backward.
        """
        forward = self.device_seconds(profile.block.forward)
        backward = self.device_seconds(profile.block.backward)
        outside = 3 * self.device_seconds(profile.outside)
        most = max(one.num_blocks for one in stages)
        blocks = [one.num_blocks for one in stages]
        last = blocks[-1] * (forward + backward) + loss_seconds + outside
        slowest = max(most * (forward + backward), last)
        again = most * forward * layout.recompute
        tensor = self._tensor_seconds(layout, profile) * most
        sharded = self._shard_seconds(layout, most, forward * (1 + layout.recompute), backward)
        handed_on = self._hand_on_seconds(layout, profile)
        count = layout.microbatches
        at_once = slowest + again + tensor + sharded + handed_on
        bubble = (layout.degrees.pipeline - 1) / layout.chunks * at_once
        local = self._largest_share(layout, stages)
        replicate = self._replicate_seconds(layout, local, most * backward)
        return StepTime(
            compute=count * slowest,
            recompute=count * again,
            exposed=count * (tensor + sharded + handed_on) + replicate,
            bubble=bubble,
            optimizer=self._optimizer_seconds(local),
            exchanged=self._exchanged(layout, local, profile, most),
        )

    def loss_seconds(self, num_targets: int, vocab: int, width: int, trains_head: bool, item: int) -> float:
        """How long the loss over a vocabulary takes, forward and backward."""
        products = 2.0 * num_targets * vocab * width
        logits = num_targets * vocab
        # Of each chunk the products are written, read into a wide copy, made probabilities, and read twice more.
        moved = logits * (4 * item + 5 * 4)
        operations = [Operation(products, 0)] * (2 + trains_head) + [Operation(0, moved)]
        return self.device_seconds(operations)

    def _largest_share(self, layout: Layout, stages: list[Rank]) -> Weights:
        """What the fullest rank has of the weights."""
        blocks = sum(self._parts.blocks[: max(one.num_blocks for one in stages)], Weights())
        outside = self._parts.outside if len(stages) == 1 else self._parts.embedding + self._parts.rest
        local = (blocks + outside).on_a_rank(layout.degrees.tensor)
        return Weights(*(one / layout.shard for one in local))

    def _tensor_seconds(self, layout: Layout, profile: NetworkProfile) -> float:
        """Of a block: two sums of hidden states forward and two backward, and again forward when recomputed."""
        group = Group(layout.degrees.tensor, 1)
        return (4 + 2 * layout.recompute) * all_reduce_seconds(self._machine, group, profile.block.hidden)

    def _shard_seconds(self, layout: Layout, num_blocks: int, forward: float, backward: float) -> float:
        """What gathering weights and scattering gradients takes beyond the computing beside it."""
        if layout.shard == 1:
            return 0.0
        group = Group(layout.shard, layout.degrees.tensor)
        block = self._parts.blocks[-1].on_a_rank(layout.degrees.tensor)
        gather = all_gather_seconds(self._machine, group, block.bytes * self._gathered_share)
        scatter = all_gather_seconds(self._machine, group, block.trained_bytes)
        if self._machine.kind == "cpu":
            return num_blocks * (2 * gather + scatter)
        return num_blocks * (max(0.0, gather - forward) + max(0.0, gather + scatter - backward)) + gather

    def _replicate_seconds(self, layout: Layout, local: Weights, backward: float) -> float:
        """What summing gradients over copies takes beyond the last micro-batch's backward pass."""
        if layout.degrees.replicate == 1:
            return 0.0
        group = Group(layout.degrees.replicate, layout.degrees.tensor * layout.shard)
        seconds = all_reduce_seconds(self._machine, group, local.trained_bytes)
        return seconds if self._machine.kind == "cpu" else max(0.1 * seconds, seconds - backward)

    def _hand_on_seconds(self, layout: Layout, profile: NetworkProfile) -> float:
        if layout.degrees.pipeline == 1:
            return 0.0
        stride = layout.degrees.replicate * layout.shard * layout.degrees.tensor
        seconds = 2 * layout.chunks * send_seconds(self._machine, stride, profile.block.hidden)
        return seconds if self._machine.kind == "cpu" else 0.5 * seconds  # half of it beside other micro-batches

    def _optimizer_seconds(self, local: Weights) -> float:
        held = self._optimizer.state * local.trained
        moved = 2 * (local.trained_bytes + held) + 3 * local.trained_bytes  # with clipping's norm and factor
        return self._machine.move_seconds(moved)

    def _exchanged(self, layout: Layout, local: Weights, profile: NetworkProfile, num_blocks: int) -> float:
        whole = local.bytes * layout.shard
        shard = (1 - 1 / layout.shard) * whole * 3 * layout.microbatches
        replicate = 2 * (1 - 1 / layout.degrees.replicate) * local.trained_bytes
        sums = (4 + 2 * layout.recompute) * 2 * (1 - 1 / layout.degrees.tensor)
        tensor = sums * profile.block.hidden * num_blocks * layout.microbatches
        handed = 2 * profile.block.hidden * layout.microbatches * (layout.degrees.pipeline > 1)
        return shard + replicate + tensor + handed
