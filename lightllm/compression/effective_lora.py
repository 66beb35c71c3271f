"""The LoRA layer with an effective weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.models.lora_linear import LoraLinear


class EffectiveLoraLinear(LoraLinear, EffectiveLayer):
    """A LoRA layer of which mask and fake quantizer see the merged weight `W + s B A`.

    The gradient of the two thin matrices then goes through the gradient of the whole weight, `[out, in]`: a product
    that LoRA alone avoids. Without an adapter in use, it is a layer of `W` alone.
    """

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        effect = self.effect
        weight = self._merged(torch.float32 if effect.rounds else self.base.weight.dtype)
        return nn.functional.linear(effect.inputs(x), effect(weight).to(self.base.weight.dtype), self.base.bias)

    @property
    @override
    def base(self) -> nn.Linear:
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        return base

    @override
    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self._merged(torch.float32).to(torch.float32, copy=True)

    def _merged(self, dtype: torch.dtype) -> Tensor:
        name = self._plain_adapter()
        weight = self.base.weight.to(dtype)
        if name is None:
            return weight
        up, down = self.lora_B[name].weight, self.lora_A[name].weight
        assert isinstance(up, Tensor)
        assert isinstance(down, Tensor)
        return torch.addmm(weight, up.to(dtype), down.to(dtype), alpha=self.scaling[name])


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
