"""The LoRA layer with an effective weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.compression.effective_weight import EffectiveLayer, accumulate_gradient
from lightllm.compression.rounded_lora import ThinFactors, rounded_lora_linear
from lightllm.models.lora_linear import LoraLinear


class EffectiveLoraLinear(LoraLinear, EffectiveLayer):
    """A LoRA layer of which mask and fake quantizer see the merged weight `W + s B A`.

    The gradient of the two thin matrices then goes through the gradient of the whole weight, `[out, in]`: a product
    that LoRA alone avoids. Without an adapter in use, it is a layer of `W` alone.
    """

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        effect, base = self.effect, self.base
        if not effect.rounds and effect.masking is None:
            return super().forward(x, *args, **kwargs)
        x = effect.inputs(x)
        factors = self._thin_factors()
        if factors is not None and effect.is_straight_through and not base.weight.requires_grad:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            with torch.no_grad():
                rounded = effect(self.merged_weight())
            return rounded_lora_linear(x, rounded, base.bias, factors)
        weight = self._merged(torch.float32 if effect.rounds else base.weight.dtype)
        return nn.functional.linear(x, effect(weight).to(base.weight.dtype), base.bias)

    @property
    @override
    def base(self) -> nn.Linear:
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        return base

    @property
    @override
    def rounded_dtype(self) -> torch.dtype:
        return torch.float32  # in which a small update is not lost beside the weight

    @override
    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight = self.base.weight.to(torch.float32, copy=True)
        factors = self._thin_factors()
        if factors is None:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return weight.addmm_(factors.up.float(), factors.down.float(), alpha=factors.scale)

    @override
    @torch.no_grad()
    def add_merged_gradient(self, gradient: Tensor) -> None:
        accumulate_gradient(self.base.weight, gradient)
        factors = self._thin_factors()
        if factors is not None:
            up, down = factors.up.to(gradient.dtype), factors.down.to(gradient.dtype)
            accumulate_gradient(factors.down, factors.scale * (up.T @ gradient))
            accumulate_gradient(factors.up, factors.scale * (gradient @ down.T))

    def _merged(self, dtype: torch.dtype) -> Tensor:
        """The same with its gradients, in `dtype`; autocast would round it before the grid does."""
        weight = self.base.weight.to(dtype)
        factors = self._thin_factors()
        if factors is None:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, factors.up.to(dtype), factors.down.to(dtype), alpha=factors.scale)

    def _thin_factors(self) -> ThinFactors | None:
        name = self._plain_adapter()
        if name is None:
            return None
        up, down = self.lora_B[name].weight, self.lora_A[name].weight
        assert isinstance(up, Tensor)
        assert isinstance(down, Tensor)
        return ThinFactors(up, down, self.scaling[name])


def as_effective_lora(name: str, layer: nn.Module) -> None:
    """Make an adapted layer an `EffectiveLoraLinear`, in place.

    Raises:
        ValueError: Its adapter is more than `s B A`, so that there is no merged weight to speak of while it trains.
    """
    if type(layer) is not LoraLinear:
        raise ValueError(
            f"{name} is peft's {type(layer).__name__}, whose merged weight can be neither masked nor rounded: take "
            "LoRA, RsLoRA or full training"
        )
    if layer.lora_variant:
        raise ValueError(f"the adapter of {name} is a variant of LoRA (DoRA): take LoRA, RsLoRA or full training")
    if any(layer.lora_bias.values()):
        raise ValueError(f"the adapter of {name} adds a bias, which is no part of a weight")
    if any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
        raise ValueError(
            f"the adapter of {name} drops inputs of its own update, which a merged weight cannot: set its dropout to 0"
        )
    layer.__class__ = EffectiveLoraLinear
