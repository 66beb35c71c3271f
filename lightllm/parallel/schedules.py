"""In what order the stages of a pipeline work on micro-batches: torch's schedules, by our names.

- `gpipe`: all micro-batches forward, then all backward (arXiv:1811.06965).
- `1f1b`: backward as soon as there is one, so that no more activations are held than there are stages
  (arXiv:2006.09503).
- `interleaved_1f1b`: the same with several stages a rank, for less idling (arXiv:2104.04473).
- `looped_bfs`: `gpipe` with several stages a rank (arXiv:2211.05953).
- `zero_bubble`: interleaved, and gradients of weights are formed where a rank would idle (arXiv:2401.10241, ZB-H1).
- `zbv`: two stages a rank, laid out as a V; nearly no idling (arXiv:2401.10241, section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from lightllm.parallel.stages import Stage

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"]


class _Kind(NamedTuple):
    """What a schedule is and asks for."""

    torch_name: str
    stages_per_rank: int
    """Its usual number."""
    single: bool
    """Whether a rank has one stage only."""
    in_rounds: bool
    """Whether micro-batches come in rounds of equal size, of one for each rank at least."""
    splits_backward: bool
    """Whether gradients of weights are formed apart from those of activations."""


_KINDS: dict[ScheduleName, _Kind] = {
    "gpipe": _Kind("GPipe", 1, single=True, in_rounds=False, splits_backward=False),
    "1f1b": _Kind("1F1B", 1, single=True, in_rounds=False, splits_backward=False),
    "interleaved_1f1b": _Kind("Interleaved1F1B", 2, single=False, in_rounds=True, splits_backward=False),
    "looped_bfs": _Kind("LoopedBFS", 2, single=False, in_rounds=False, splits_backward=False),
    "zero_bubble": _Kind("InterleavedZeroBubble", 2, single=False, in_rounds=True, splits_backward=True),
    "zbv": _Kind("ZBVZeroBubble", 2, single=False, in_rounds=False, splits_backward=True),
}


class Plan(NamedTuple):
    """A schedule for a number of ranks, checked."""

    name: ScheduleName
    num_ranks: int
    microbatches: int
    stages_per_rank: int

    @property
    def num_stages(self) -> int:
        """Of the whole pipeline."""
        return self.num_ranks * self.stages_per_rank

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are formed apart: what is recomputed or compiled cannot be split."""
        return _KINDS[self.name].splits_backward

    def rank_of(self, stage: int) -> int:
        """Which rank of the pipeline has a stage: in turn, or there and back for `zbv`."""
        turn, place = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - place if self.name == "zbv" and turn % 2 else place

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in order."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]

    def bubble(self) -> float:
        """Share of the time that a rank idles, if all stages take equally long and nothing is lost on the wire.

        `(ranks - 1) / (stages_per_rank * microbatches + ranks - 1)`; for schedules that split the backward pass
        that is what remains at most.
        """
        return (self.num_ranks - 1) / (self.stages_per_rank * self.microbatches + self.num_ranks - 1)


def make_plan(name: ScheduleName, num_ranks: int, microbatches: int, stages_per_rank: int | None) -> Plan:
    """Check what a user asks for.

    Raises:
        ValueError: There is no such schedule, or it cannot work with these numbers; the message says with which.
    """
    if name not in _KINDS:
        raise ValueError(f"no schedule {name!r}: there are {', '.join(_KINDS)}")
    kind = _KINDS[name]
    if num_ranks < 2:
        raise ValueError(f"pipeline is {num_ranks}: a pipeline has at least 2; for one, take another strategy")
    stages = kind.stages_per_rank if stages_per_rank is None else stages_per_rank
    if kind.single and stages != 1:
        raise ValueError(f"stages_per_rank is {stages}, and {name} has 1: leave it out, or take interleaved_1f1b")
    if not kind.single and stages < 2:
        raise ValueError(f"stages_per_rank is {stages}, and {name} needs at least 2: leave it out, or take 1f1b")
    if name == "zbv" and stages != 2:
        raise ValueError(f"stages_per_rank is {stages}, and zbv has 2: leave it out, or take zero_bubble")
    if microbatches < num_ranks:
        raise ValueError(
            f"microbatches is {microbatches}, and {num_ranks} ranks would never all be at work: give at least "
            f"{num_ranks}; with {4 * num_ranks} they idle less"
        )
    rounds = microbatches // num_ranks
    if kind.in_rounds and microbatches % rounds:
        below = microbatches - microbatches % num_ranks
        raise ValueError(
            f"microbatches is {microbatches}, which {name} cannot divide into {rounds} equal rounds for {num_ranks} "
            f"ranks: give {below} or {below + num_ranks}"
        )
    return Plan(name, num_ranks, microbatches, stages)


Objective = Callable[[Tensor, int], Tensor]
"""The summed loss of a micro-batch, a scalar: of its last hidden states, and of its number."""


class TrainingSchedule:
    """Forward and backward passes of one shape of micro-batches; gradients are added up in the parameters.

    Args:
        plan: The schedule.
        stages: Those of this rank.
        shape: Of a micro-batch's hidden states: `[batch, seq, hidden]`.
        dtype: Theirs.
        group: The ranks of the pipeline.
        objective: Called on the rank of the last stage.
    """

    def __init__(
        self,
        plan: Plan,
        stages: Sequence[Stage],
        shape: torch.Size,
        dtype: torch.dtype,
        group: ProcessGroup,
        objective: Objective,
    ) -> None:
        self.shape = shape
        self._plan = plan
        self._own_first = stages[0].is_first
        hidden = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        device = next(parameter.device for stage in stages for parameter in stage.parameters())
        # With what goes from stage to stage known beforehand, torch needs no trial of the first micro-batch.
        wired = [
            PipelineStage(
                stage,
                stage.index,
                plan.num_stages,
                device,
                input_args=torch.empty(1, dtype=torch.int64, device="meta") if stage.is_first else hidden,
                output_args=hidden,
                group=group,
            )
            for stage in stages
        ]
        kind = _KINDS[plan.name]
        arguments: Any = wired[0] if kind.single else wired
        self._schedule = get_schedule_class(kind.torch_name)(
            arguments,
            n_microbatches=plan.microbatches,
            loss_fn=lambda hidden, number: objective(hidden, int(number)),
            scale_grads=False,
        )

    def run(self) -> None:
        """Run a step on the stages' `microbatches`."""
        # Every stage has the whole batch, so all that torch is to cut up are the numbers of the micro-batches.
        numbers = torch.arange(self._plan.microbatches)
        arguments = (numbers,) if self._own_first else ()
        self._schedule.step(*arguments, number=numbers, target=numbers, return_outputs=False)
