"""What a rank holds at its worst, by the phases of a training step."""

from __future__ import annotations

from dataclasses import dataclass

from lightllm.parallel.block_profile import NetworkProfile
from lightllm.parallel.loss_buffers import LossBuffers
from lightllm.parallel.network_parts import NetworkParts, Weights
from lightllm.parallel.plan_layout import Layout


@dataclass(frozen=True)
class OptimizerCost:
    """What an optimizer holds for a weight that trains."""

    state: float
    """Bytes a weight, from one step to the next."""
    scratch: float
    """Bytes a weight of the largest parameter, while it steps."""
    scratch_of_all: float = 0.0
    """Bytes a weight of all that train at once: an optimizer of many-tensor kernels."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. The parts are those at the worst moment, and `peak` is their sum."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    loss: float
    working: float
    """What a block's backward pass, a gathered block or the optimizer's step takes for a moment."""
    phase: str
    """The worst moment."""

    @property
    def peak(self) -> float:
        """All of it."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.loss + self.working


@dataclass(frozen=True)
class Rank:
    """What one rank has to do with: its stage's share of the network."""

    num_blocks: int
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the head, and with it the loss."""
    in_flight: float
    """Micro-batches whose activations it holds at once; a part of one counts as its share of the blocks."""


def ranks(layout: Layout, num_blocks: int) -> list[Rank]:
    """The ranks along the pipeline; one, where there is none."""
    stages = layout.degrees.pipeline
    sizes = [num_blocks // stages + (index < num_blocks % stages) for index in range(stages)]
    found = []
    for stage, size in enumerate(sizes):
        if layout.chunks == 1:
            in_flight = float(min(layout.microbatches, stages - stage))
        else:
            held = 2 * (stages - stage - 1) + (layout.chunks - 1) * stages + 1
            in_flight = min(layout.microbatches * layout.chunks, held) / layout.chunks
        found.append(Rank(size, stage == 0, stage == stages - 1, in_flight))
    return found


class MemoryModel:
    """The arithmetic of one job: what is alive in each phase of a step.

    Args:
        parts: The network's parameters.
        optimizer: What the optimizer holds.
        gathered_share: Bytes of a gathered weight over those of its shard, which may be in a wider type.
    """

    def __init__(self, parts: NetworkParts, optimizer: OptimizerCost, gathered_share: float = 1.0) -> None:
        self._parts = parts
        self._optimizer = optimizer
        self._gathered_share = gathered_share

    def estimate(self, layout: Layout, rank: Rank, profile: NetworkProfile, loss: LossBuffers) -> MemoryEstimate:
        """The worst moment of a rank."""
        tensor = layout.degrees.tensor
        stage, outside = self._stage(rank)
        whole = stage + outside
        local = whole.on_a_rank(tensor)
        share = 1 / layout.shard
        weights, gradients = local.bytes * share, local.trained_bytes * share
        state = self._optimizer.state * local.trained * share
        collected = self._collected(layout, rank, local, outside.on_a_rank(tensor))
        head_gradient = self._head_gradient(outside) * share
        kept, block_peak = _of_block(profile, layout.recompute)
        active = max(0, min(rank.num_blocks, len(self._parts.blocks) - self._parts.first_trained))
        around = profile.outside_kept if rank.first or rank.last else 0
        activations = rank.in_flight * active * kept + around * (rank.in_flight if rank.first else 1)
        accumulated = gradients if layout.microbatches > 1 else 0.0
        losses = (loss.forward, loss.kept + loss.backward) if rank.last else (0.0, 0.0)
        embedding = self._parts.embedding.trained_bytes / tensor if rank.first else 0.0
        moments = {
            # Gradients of the last step are there until backward begins: Lightning zeroes them between the two.
            "loss": (gradients, activations, losses[0], collected.forward),
            "head": (accumulated, activations, losses[1], collected.forward),
            "last block": (
                max(accumulated, head_gradient),
                activations,
                profile.block.hidden,
                block_peak + collected.backward,
            ),
            "first block": (
                max(accumulated, gradients - embedding * share),
                activations - max(active - 1, 0) * kept,
                profile.block.hidden,
                block_peak + collected.backward,
            ),
            "embedding": (gradients, around, profile.block.hidden, embedding + collected.backward),
            "optimizer": (gradients, 0.0, 0.0, self._scratch(local, share)),
        }
        gathered = collected.always if layout.shard > 1 else 0.0  # until the backward pass is over
        phase = max(moments, key=lambda name: sum(moments[name]) - gathered * (name == "optimizer"))
        worst = moments[phase]
        return MemoryEstimate(
            weights=weights + collected.always - gathered * (phase == "optimizer"),
            optimizer=state,
            gradients=worst[0],
            activations=worst[1],
            loss=worst[2],
            working=worst[3],
            phase=phase,
        )

    def _stage(self, rank: Rank) -> tuple[Weights, Weights]:
        """The parameters of a rank's blocks, and those outside of blocks, of the whole model in tensor terms."""
        largest = sorted(self._parts.blocks, key=lambda one: -one.bytes)[: rank.num_blocks]
        outside = self._parts.rest
        if rank.first:
            outside += self._parts.embedding
        if rank.last:
            outside += self._parts.embedding if self._parts.tied and not rank.first else self._parts.head
        return sum(largest, Weights()), outside

    def _head_gradient(self, outside: Weights) -> float:
        return (self._parts.embedding if self._parts.tied else self._parts.head).trained_bytes

    def _scratch(self, local: Weights, share: float) -> float:
        return self._optimizer.scratch * local.largest * share + self._optimizer.scratch_of_all * local.trained * share

    def _collected(self, layout: Layout, rank: Rank, local: Weights, outside: Weights) -> _Collected:
        """What ranks that share weights hold of others for a moment, or copies of gradients that are on their way."""
        if layout.shard == 1:
            replicated = layout.degrees.replicate > 1
            # Buckets of gradients, which are not views of them.
            return _Collected(always=local.trained_bytes if replicated else 0.0)
        block = max(self._parts.blocks, key=lambda one: one.bytes).on_a_rank(layout.degrees.tensor)
        ratio = self._gathered_share
        gathered, formed, sent = block.bytes * ratio, block.trained_bytes * ratio, block.trained_bytes
        return _Collected(
            always=outside.bytes * ratio,
            forward=3 * gathered,
            # Two blocks' weights and one on its way, gradients as they were formed, and as they are sent.
            backward=3 * gathered + formed + sent + outside.trained_bytes * ratio,
        )


@dataclass(frozen=True)
class _Collected:
    always: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


def _of_block(profile: NetworkProfile, recompute: bool) -> tuple[float, float]:
    """What a block keeps, and what its backward pass adds."""
    block = profile.block
    if not recompute:
        return block.kept, block.backward_peak
    inner = block.kept - block.hidden * block.keeps_input
    return block.hidden, max(block.forward_peak, inner + block.backward_peak)
