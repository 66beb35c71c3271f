"""Collectives with a gradient: what layers that share a matrix send each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` as it is; its gradient, of which each rank finds a part, is summed over the group."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    summed: Tensor = _SumGradient.apply(x, group)
    return summed


def sum_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' `x`; each has the gradient of the sum, which is the same on all of them."""
    summed: Tensor = _SumParts.apply(x, group)
    return summed


def gather_last(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' `[..., part]` beside each other, `[..., parts]`; each gets its part of the gradient."""
    gathered: Tensor = _GatherLast.apply(x, group)
    return gathered


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # it may be somebody else's too
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank, ctx.width = torch.distributed.get_rank(group), x.shape[-1]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, ctx.rank * ctx.width, ctx.width), None
