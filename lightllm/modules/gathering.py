"""Tensors of all ranks in one, through which gradients find their way back to where each row came from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist


class Gathered(NamedTuple):
    """Rows of all ranks, one rank's after another's."""

    rows: Tensor
    begin: int
    """Where this rank's rows begin."""


def gather_rows(rows: Tensor) -> Gathered:
    """The rows `[n, …]` of every rank, of which each may have another number.

    The gradient that a rank's rows get is the sum of what all ranks' losses ask of them. Every rank must call it.
    """
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    begin = sum(sizes[: dist.get_rank()])
    gathered: Tensor = _GatherRows.apply(rows, sizes, begin)
    return Gathered(gathered, begin)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], begin: int) -> Tensor:
        ctx.begin, ctx.count = begin, len(rows)
        # Collectives want equal shapes: everybody's rows in their places, and zeros elsewhere, are summed.
        whole = rows.new_zeros(sum(sizes), *rows.shape[1:])
        whole[begin : begin + len(rows)] = rows
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.begin : ctx.begin + ctx.count], None, None
