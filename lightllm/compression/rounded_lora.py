"""The product with a rounded LoRA weight, whose gradients cost what those of LoRA do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ThinFactors(NamedTuple):
    """The update `scale * up @ down` of a weight `[out, in]`."""

    up: Tensor
    """`[out, rank]`."""
    down: Tensor
    """`[rank, in]`."""
    scale: float


def rounded_lora_linear(x: Tensor, rounded: Tensor, bias: Tensor | None, factors: ThinFactors) -> Tensor:
    """`x Q(W + scale B A)' + bias`, with gradients for `x`, `B` and `A` as if `Q` were not there.

    The gradient of the whole weight, `G = g' x` of `[out, in]`, is what a layer with a rounded weight seems to need,
    and half as much work again as a step of LoRA. But as it goes straight through the rounding, `dB = scale G A'` and
    `dA = scale B' G` are products of thin matrices: `g' (x A')` and `(g B)' x`.

    Args:
        x: `[..., in]`.
        rounded: `Q(W + scale B A)`, `[out, in]`, which gets no gradient itself.
        bias: `[out]`, frozen.
        factors: `B` and `A`.

    Returns:
        `[..., out]`.
    """
    up, down = factors.up.to(x.dtype), factors.down.to(x.dtype)
    output: Tensor = _RoundedLora.apply(x, rounded.to(x.dtype), bias, up, down, factors.scale)
    return output


class _RoundedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, up, down)
        ctx.scale = scale
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        grad_x = (g @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_up = (g.T @ (rows @ down.T)).mul_(ctx.scale)
        grad_down = (g @ up).mul_(ctx.scale).T @ rows
        return grad_x, None, None, grad_up, grad_down, None
