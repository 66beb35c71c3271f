"""The forward pass alone through the stages of a pipeline: for validation, test and prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from lightllm.batch import TextBatch
from lightllm.parallel.schedules import Plan
from lightllm.parallel.stages import Stage


def relay(
    plan: Plan,
    stages: Sequence[Stage],
    microbatches: Sequence[TextBatch],
    width: int,
    dtype: torch.dtype,
    group: ProcessGroup,
) -> Iterator[tuple[Tensor, TextBatch]]:
    """Pass micro-batches of any shapes through all stages; every rank of the pipeline must run it to its end.

    Args:
        plan: Which rank has which stage.
        stages: Those of this rank, in order.
        microbatches: The same ones on every rank.
        width: Of the hidden states.
        dtype: Of the hidden states.
        group: The ranks of the pipeline.

    Yields:
        On the rank of the last stage, hidden states `[batch, seq, hidden]` for the head, with their micro-batch.
    """
    me = torch.distributed.get_rank(group)
    waiting: dict[tuple[int, int], Tensor] = {}  # by stage and micro-batch: what need not go over the wire
    sent: list[tuple[Work | None, Tensor]] = []
    for stage in stages:
        stage.microbatches = microbatches
        for number, batch in enumerate(microbatches):
            received = batch["input_ids"]  # which the first stage looks up by itself
            if not stage.is_first:
                if (stage.index, number) in waiting:
                    received = waiting.pop((stage.index, number))
                else:
                    shape = (*batch["input_ids"].shape, width)
                    received = torch.empty(shape, dtype=dtype, device=batch["input_ids"].device)
                    source = plan.rank_of(stage.index - 1)
                    torch.distributed.recv(received, group=group, group_src=source)
            output = stage(received, torch.tensor([number]))
            if stage.is_last:
                yield output, batch
            elif plan.rank_of(stage.index + 1) == me:
                waiting[stage.index + 1, number] = output
            else:
                target = plan.rank_of(stage.index + 1)
                # Nobody waits here: a rank may be one that must first get something from the next.
                sent.append((torch.distributed.isend(output, group=group, group_dst=target), output))
    for work, _ in sent:
        if work is not None:
            work.wait()
