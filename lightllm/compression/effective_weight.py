"""The effective weight, `Q(M * (W + s B A))`: low-rank update, mask and fake quantization are parts of one weight.

A layer that is masked or fake-quantized computes with its effective weight, from the parameters that it had before, by
the same names; so a LoRA adapter that was trained under a mask is an ordinary adapter. What an export bakes is the
effective weight too: what is exported is what was trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.models.plain_tensors import StandsForPlain


class FakeQuantizer(nn.Module, ABC):
    """`Q`: rounds to what few bits can hold, and lets gradients through as if it did not."""

    enabled: bool = True
    """Whether anything is rounded."""
    is_straight_through: bool = False
    """Whether the gradient of the rounded weight is that of the weight as it is."""

    @abstractmethod
    def weight(self, weight: Tensor) -> Tensor:
        """The weight `[out, in]` on its grid."""

    @abstractmethod
    def inputs(self, inputs: Tensor) -> Tensor:
        """The layer's inputs `[..., in]` on theirs, or as they are."""


class FixedMask(nn.Module):
    """`M`: which weights are kept; eight of its entries take a byte of a checkpoint.

    Args:
        shape: `(out, in)` of the weight.
        device: The weight's.
    """

    keep: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(shape, dtype=torch.bool, device=device), persistent=False)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep

    @override
    def get_extra_state(self) -> Tensor:
        flags = self.keep.flatten()
        flags = nn.functional.pad(flags, (0, -len(flags) % 8)).view(-1, 8)
        return (flags * _bit_values(flags.device)).sum(1, dtype=torch.uint8)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        flags = (state.to(self.keep.device)[:, None] & _bit_values(self.keep.device)) != 0
        self.keep.copy_(flags.flatten()[: self.keep.numel()].view(self.keep.shape))


def _bit_values(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


class WeightEffect(nn.Module):
    """What is done to a layer's merged weight: `Q(M * weight)`, each part optional."""

    def __init__(self) -> None:
        super().__init__()
        self.masking: nn.Module | None = None
        """From the weight `[out, in]` to the masked weight: a `FixedMask`, or one that is still learned."""
        self.fake_quantizer: FakeQuantizer | None = None
        self.rounds_inputs = True
        """Whether inputs are rounded too, by a fake quantizer that does so."""

    @property
    def rounds(self) -> bool:
        """Whether a fake quantizer is at work."""
        return self.fake_quantizer is not None and self.fake_quantizer.enabled

    @property
    def is_straight_through(self) -> bool:
        """Whether the gradient of the effective weight is that of the merged weight as it is."""
        return self.masking is None and (self.fake_quantizer is None or self.fake_quantizer.is_straight_through)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        masked = weight if self.masking is None else self.masking(weight)
        return self.quantized(masked)

    def quantized(self, weight: Tensor) -> Tensor:
        """`Q(weight)`."""
        return self.fake_quantizer.weight(weight) if self.fake_quantizer is not None and self.rounds else weight

    def inputs(self, inputs: Tensor) -> Tensor:
        """The layer's inputs, rounded where activations are."""
        if self.fake_quantizer is None or not self.rounds or not self.rounds_inputs:
            return inputs
        return self.fake_quantizer.inputs(inputs)


class EffectiveLayer(StandsForPlain):
    """A linear layer that computes with its effective weight."""

    effect: WeightEffect

    @property
    @abstractmethod
    def base(self) -> nn.Linear:
        """The layer that holds `W`."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """`W + s B A`, `[out, in]` in float32, detached and its own memory."""

    @property
    @abstractmethod
    def rounded_dtype(self) -> torch.dtype:
        """Of the merged weight as it comes to be rounded."""

    @torch.no_grad()
    def masked_weight(self) -> Tensor:
        """`M * (W + s B A)`, `[out, in]` in `rounded_dtype`, detached."""
        weight = self.merged_weight().to(self.rounded_dtype)
        masked: Tensor = weight if self.effect.masking is None else self.effect.masking(weight)
        return masked

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`Q(M * (W + s B A))`, `[out, in]` in float32, detached."""
        return self.effect.quantized(self.masked_weight()).float()

    @abstractmethod
    def add_merged_gradient(self, gradient: Tensor) -> None:
        """Add to the gradients of whatever of `W + s B A` trains what a gradient `G` of the merged weight means for it.

        By the chain rule: `G` for `W`, `s B' G` for `A` and `s G A'` for `B`.

        Args:
            gradient: `G`, `[out, in]`.
        """

    @torch.no_grad()
    def write_merged(self, weight: Tensor) -> None:
        """Change `W` so that `W + s B A` is `weight`, `[out, in]`, and whatever adapter there is stays as it is."""
        own = self.base.weight
        own.copy_(weight.to(own.device, torch.float32) - (self.merged_weight() - own.float()))
        self.hold_weight()

    def set_keep(self, keep: Tensor) -> None:
        """Mask the weight by `keep`, bool `[out, in]`."""
        self.fixed_mask().keep.copy_(keep)
        self.hold_weight()

    def fixed_mask(self) -> FixedMask:
        """The mask.

        Raises:
            ValueError: The layer has none, or one that is still learned.
        """
        if not isinstance(self.effect.masking, FixedMask):
            raise ValueError("this layer has no fixed mask")
        return self.effect.masking

    def hold_weight(self) -> None:
        """Zero what a fixed mask leaves out of `W`, if `W` is all there is: a sum is masked as it is used."""

    def hold_gradient(self) -> None:
        """Zero the gradient of what `hold_weight` zeroes."""

    @override
    def plain_tensors(self) -> dict[str, Tensor]:
        own = {name: parameter.detach() for name, parameter in self.base.named_parameters(recurse=False)}
        return {**own, "weight": self.effective_weight()}


class EffectiveLinear(nn.Linear, EffectiveLayer):
    """`nn.Linear` with an effective weight.

    A fixed mask is *held*: what it leaves out is zero in the weight itself and in its gradient (by whoever set the
    mask, after each step), so that a forward pass costs what it did.
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        effect = self.effect
        held = effect.masking is None or isinstance(effect.masking, FixedMask)
        weight = effect.quantized(self.weight) if held else effect(self.weight)
        return nn.functional.linear(effect.inputs(input), weight.to(self.weight.dtype), self.bias)

    @property
    @override
    def base(self) -> nn.Linear:
        return self

    @property
    @override
    def rounded_dtype(self) -> torch.dtype:
        return self.weight.dtype

    @override
    def merged_weight(self) -> Tensor:
        return self.weight.detach().to(torch.float32, copy=True)

    @override
    def add_merged_gradient(self, gradient: Tensor) -> None:
        accumulate_gradient(self.weight, gradient)

    @override
    @torch.no_grad()
    def hold_weight(self) -> None:
        if isinstance(self.effect.masking, FixedMask):
            zero_outside(self.weight, self.effect.masking.keep)

    @override
    @torch.no_grad()
    def hold_gradient(self) -> None:
        if isinstance(self.effect.masking, FixedMask) and self.weight.grad is not None:
            zero_outside(self.weight.grad, self.effect.masking.keep)


@torch.no_grad()
def accumulate_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient as a backward pass would; one that is frozen gets none."""
    if parameter.requires_grad:
        gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


def zero_outside(tensor: Tensor, keep: Tensor) -> None:
    """Zero, in place, what a mask `[out, in]` of bool leaves out of a weight or its gradient."""
    if tensor.device.type == "cpu" and tensor.element_size() == 2:
        # Bits times 0 or 1: a third of the time of torch's product of half precision and bool.
        tensor.view(torch.int16).mul_(keep.view(torch.int8))
    else:
        tensor.mul_(keep)
