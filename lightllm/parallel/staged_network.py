"""A network of which this process has some stages, and how a batch goes through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightllm.batch import TextBatch
from lightllm.parallel.balance import balanced_cut, check_cut
from lightllm.parallel.layout import Cost, Layout
from lightllm.parallel.microbatches import equal_microbatches, split_rows
from lightllm.parallel.relay import relay
from lightllm.parallel.schedules import Plan, TrainingSchedule
from lightllm.parallel.stages import check_composition, drop_others, make_stages, shared_between

Criterion = Callable[[Tensor, TextBatch], tuple[Tensor, Tensor]]
"""Loss of hidden states `[batch, seq, hidden]` and a batch, as a sum and a weight."""

Cut = Cost | list[int]
"""Where to cut: so that stages cost as much as each other, by `flops` or `parameters`, or the blocks of each stage."""


class StagedNetwork:
    """The stages of this rank of a pipeline. Every rank of it must make one, and call its methods with the same batch.

    What belongs to the stages of other ranks leaves the memory when it is made.

    Args:
        plan: Who has which stage, and in what order they work.
        layout: Of the whole network, whose weights are there.
        cut: Where to cut it.
        group: The ranks of the pipeline.

    Raises:
        ValueError: The network cannot be cut so; the message says why.
    """

    def __init__(self, plan: Plan, layout: Layout, cut: Cut, group: ProcessGroup) -> None:
        self.plan = plan
        self.group = group
        rank = torch.distributed.get_rank(group)
        self.sizes = _sizes(layout, cut, plan.num_stages)
        stages = make_stages(layout, self.sizes)
        check_composition(layout, stages)
        own = plan.stages_of(rank)
        ends = {plan.rank_of(0), plan.rank_of(plan.num_stages - 1)}
        self._shared = shared_between(stages[0], stages[-1], rank != plan.rank_of(0)) if rank in ends else []
        self.other_end = sum(ends) - rank if len(ends) == 2 else rank
        """Where this rank has an end of the pipeline, the rank of the other one."""
        drop_others(stages, own)
        self.stages = [stages[index] for index in own]
        self.has_last = self.stages[-1].is_last
        self._layout = layout
        self._schedule: TrainingSchedule | None = None
        self._criterion: Criterion | None = None
        self._sums: list[Tensor] = []

    @property
    def network(self) -> nn.Module:
        """The network that was cut."""
        return self._layout.network

    @property
    def shared(self) -> list[nn.Parameter]:
        """Parameters that one other rank has too, the one of the other end: a head that is tied to the embedding."""
        if self.other_end == torch.distributed.get_rank(self.group):
            return []
        return [parameter for module, name in self._shared if (parameter := module._parameters[name]) is not None]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of this rank, each once."""
        return list(dict.fromkeys(one for stage in self.stages for one in stage.parameters()))

    @property
    def counted_once(self) -> list[nn.Parameter]:
        """Those of this rank without those that the rank of the first stage counts: together, ranks have each once."""
        elsewhere = {id(one) for one in self.shared} if self.has_last else set()
        return [one for one in self.parameters if id(one) not in elsewhere]

    def train(self, batch: TextBatch, criterion: Criterion) -> Tensor:
        """Run a batch forward and backward, in micro-batches; gradients of the summed loss are added up.

        Returns:
            The sum of the loss and its weight, float64 `[2]`, on every rank.
        """
        microbatches = equal_microbatches(batch, self.plan.microbatches)
        for stage in self.stages:
            stage.microbatches = microbatches
        shape = torch.Size((*microbatches[0]["input_ids"].shape, self._layout.width))
        if self._schedule is None or self._schedule.shape != shape:
            self._schedule = TrainingSchedule(
                self.plan, self.stages, shape, self._layout.dtype, self.group, self._objective
            )
        self._criterion, self._sums = criterion, []
        self._schedule.run()
        self._criterion = None
        sums = torch.zeros(2, dtype=torch.float64, device=batch["labels"].device)
        if self._sums:
            sums += torch.stack(self._sums).sum(0)
        torch.distributed.all_reduce(sums, group=self.group)
        return sums

    def evaluate(self, batch: TextBatch) -> Iterator[tuple[Tensor, TextBatch]]:
        """Run a batch forward, in micro-batches: on the rank of the last stage, hidden states for the head, and rows.

        The iterator must be run to its end, also where it gives nothing.
        """
        parts = split_rows(batch, self.plan.microbatches)
        return relay(self.plan, self.stages, parts, self._layout.width, self._layout.dtype, self.group)

    def _objective(self, hidden: Tensor, number: int) -> Tensor:
        assert self._criterion is not None
        with self._layout.context():
            total, weight = self._criterion(hidden, self.stages[-1].microbatches[number])
        self._sums.append(torch.stack([total.detach().double(), weight.detach().double()]))
        return total


def _sizes(layout: Layout, cut: Cut, num_stages: int) -> Sequence[int]:
    num_blocks = len(layout.stack)
    if not isinstance(cut, str):
        check_cut(cut, num_blocks, num_stages)
        return cut
    if num_stages > num_blocks:
        raise ValueError(
            f"{layout.architecture} has {num_blocks} blocks, too few for {num_stages} stages of one at least: lower "
            "pipeline or stages_per_rank"
        )
    blocks, before, behind = layout.costs(cut)
    return balanced_cut(blocks, num_stages, before, behind)
