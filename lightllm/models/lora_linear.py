"""The LoRA layer that trains: peft's, with a forward and backward pass that copy nothing.

Peft keeps an adapter in float32 beside a bfloat16 weight and casts the layer's *input* up to it, once a layer, and
keeps that copy for the backward pass. Here the adapter's two thin matrices are cast down instead, as autocast does,
and both products are added in place: no tensor of the layer's width is made that a frozen layer would not make.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override


class LoraLinear(PeftLoraLinear):
    """Peft's LoRA layer around an `nn.Linear`; same parameters, names, merging and files.

    Whatever is more than one active plain adapter without dropout (DoRA, merged, disabled, mixed batches) is left to
    peft's own forward.
    """

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            return _plain_forward(
                x.to(dtype), base.weight.to(dtype), base.bias, self.lora_A[name], self.lora_B[name], self.scaling[name]
            )
        return _plain_forward(x, base.weight, base.bias, self.lora_A[name], self.lora_B[name], self.scaling[name])

    def _plain_adapter(self) -> str | None:
        """The active adapter if it is the only one and there is nothing to it but `scale * B @ A`."""
        if self.disable_adapters or self.merged or self.lora_variant:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.lora_bias[active[0]]:
            return None
        return active[0] if isinstance(self.lora_dropout[active[0]], nn.Identity) else None


def _plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: nn.Module, up: nn.Module, scale: float
) -> Tensor:
    a, b = down.weight, up.weight
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return nn.functional.linear(x, weight, bias) + (x @ a.to(x.dtype).T) @ (b.to(x.dtype).T * scale)
    output: Tensor = _LowRankLinear.apply(x, weight, bias, a.to(x.dtype), b.to(x.dtype), scale)
    return output


class _LowRankLinear(torch.autograd.Function):
    """`y = x W' + bias + scale * (x A') B'`; `W`, `bias` frozen; `x` `[..., in]`, `A` `[rank, in]`, `B` `[out, rank]`.

    With `u = x A'` and the gradient `g` of `y`: `dx = g W + scale * (g B) A`, `dA = scale * (g B)' x`,
    `dB = scale * g' u`. Only `x` and the thin `u` are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        thin = rows @ a.T
        output = rows @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), rows, weight.T)
        output.addmm_(thin, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, thin)
        ctx.scale = scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, thin = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        g_thin = (g @ b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(g_thin, a).view(x.shape)
        grad_a = g_thin.T @ x.reshape(-1, x.shape[-1])
        grad_b = (g.T @ thin).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None
