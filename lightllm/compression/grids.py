"""The grids of low-bit formats: which numbers a weight can be, to the bit as torchao and the `gguf` package have them.

A group of neighbouring weights of one output shares a scale; a weight is its scale times a small integer. Everything
works on the last dimension of `[..., group]`, so that an algorithm can round a group or a single column of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override


class Grid(ABC):
    """Integers times a scale, one scale a group."""

    bits: int
    """Of an integer."""
    group_size: int | None
    """How many neighbours in a row share a scale; None: the whole row."""

    @abstractmethod
    def scales(self, groups: Tensor) -> Tensor:
        """The scale of each group: `[..., group]` to `[..., 1]`."""

    @abstractmethod
    def integers(self, values: Tensor, scales: Tensor) -> Tensor:
        """The integers of values `[..., n]` with the scales `[..., 1]`: whole numbers in a new float tensor."""

    def values(self, integers: Tensor, scales: Tensor) -> Tensor:
        """What the integers `[..., n]` stand for; `integers` is overwritten."""
        return integers.mul_(self.stored_scales(scales))

    def stored_scales(self, scales: Tensor) -> Tensor:
        """Scales as the format keeps them, by which integers are multiplied."""
        return scales

    def round(self, values: Tensor, scales: Tensor) -> Tensor:
        """The grid's values in place of `[..., n]`, with the scales `[..., 1]` of `scales`."""
        return self.values(self.integers(values, scales), scales)

    def groups(self, weight: Tensor) -> Tensor:
        """A weight `[out, in]` as `[out, groups, group]`.

        Raises:
            ValueError: The weight's rows cannot be cut into such groups.
        """
        size = self.group_size or weight.shape[-1]
        if weight.shape[-1] % size:
            raise ValueError(
                f"a weight with rows of {weight.shape[-1]} cannot be cut into groups of {size}: choose a group_size "
                "that divides it, or leave the layer out"
            )
        return weight.unflatten(-1, (-1, size))

    def round_weight(self, weight: Tensor, scales: Tensor | None = None) -> Tensor:
        """A weight `[out, in]` on the grid.

        Args:
            weight: In any floating-point dtype.
            scales: `[out, groups, 1]`; by default those of the weight.

        Returns:
            The nearest weight on the grid, `[out, in]`: of the same dtype, and in float32 where the format's values
            are float32 whatever they were made from.
        """
        groups = self.groups(weight)
        return self.round(groups, self.scales(groups) if scales is None else scales).flatten(-2)


@dataclass(frozen=True)
class SymmetricGrid(Grid):
    """torchao's symmetric integers, `-2^(bits-1) … 2^(bits-1) - 1`; the largest magnitude is half an integer beyond.

    All arithmetic is in the weight's dtype, with the roundings that this brings in bfloat16.

    Args:
        bits: 2 to 8.
        group_size: See `Grid`.
        float32_scales: Scales are float32 whatever the weight's dtype, as in torchao's int8 tensors; else of its dtype,
            as in its tensors of any number of bits.
        scale_dtype: Scales are numbers of this dtype, though those of a wider weight are tensors of its own.
    """

    bits: int
    group_size: int | None = None
    float32_scales: bool = False
    scale_dtype: torch.dtype | None = None

    @override
    def scales(self, groups: Tensor) -> Tensor:
        # The largest of each group is found in float32, which is exact and, for bfloat16, ten times as fast.
        largest = groups.abs().float().amax(-1, keepdim=True).to(groups.dtype)
        kept = torch.finfo(self.scale_dtype or groups.dtype)
        smallest = torch.finfo(torch.float32).eps if self.float32_scales else kept.smallest_normal
        scales = (largest / ((2**self.bits - 1) / 2)).clamp_(min=smallest)
        if self.float32_scales:
            return scales.float()
        return scales if self.scale_dtype is None else scales.to(self.scale_dtype).to(groups.dtype)

    @override
    def integers(self, values: Tensor, scales: Tensor) -> Tensor:
        return (values * (1.0 / scales)).round_().clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    @override
    def round_weight(self, weight: Tensor, scales: Tensor | None = None) -> Tensor:
        return super().round_weight(weight, scales).to(weight.dtype)


@dataclass(frozen=True)
class Q4_0Grid(Grid):
    """GGUF's Q4_0: `-8 … 7` times a scale of either sign, by which the largest magnitude is always `-8`.

    Integers are found with the scale in float32, and stand for multiples of the scale in float16. So a weight that is
    on the grid stays what it is when it is rounded again.
    """

    group_size: int | None = 32
    bits: int = 4

    @override
    def scales(self, groups: Tensor) -> Tensor:
        groups = groups.float()
        if torch.compiler.is_compiling():  # no branch that depends on numbers, and fast enough
            return _first_largest(groups) / -8
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        largest = torch.where(high > -low, high, low)
        tied = (high == -low) & (high != 0)
        if tied.any():
            largest[tied] = _first_largest(groups[tied.squeeze(-1)]).squeeze(-1)
        return largest / -8

    @override
    def integers(self, values: Tensor, scales: Tensor) -> Tensor:
        shifted = (values.float() * _reciprocal(scales)).add_(8.5)
        return shifted.floor_().clamp_(0, 15).sub_(8)  # trunc would be the same, and is fifty times as slow

    @override
    def stored_scales(self, scales: Tensor) -> Tensor:
        return scales.half().float()


@dataclass(frozen=True)
class Q8_0Grid(Grid):
    """GGUF's Q8_0: `-127 … 127`, halves rounded away from zero, times a scale in float16; see `Q4_0Grid`."""

    group_size: int | None = 32
    bits: int = 8

    @override
    def scales(self, groups: Tensor) -> Tensor:
        return groups.abs().float().amax(-1, keepdim=True) / 127

    @override
    def integers(self, values: Tensor, scales: Tensor) -> Tensor:
        scaled = values.float() * _reciprocal(scales)
        magnitude = scaled.abs()
        whole = magnitude.floor()
        whole.add_(magnitude.sub_(whole).mul_(2).floor_()).clamp_(max=127)
        return torch.copysign(whole, scaled, out=whole)

    @override
    def stored_scales(self, scales: Tensor) -> Tensor:
        return scales.half().float()


def _first_largest(groups: Tensor) -> Tensor:
    """The value of the largest magnitude with its sign, `[..., 1]`; the first of equal ones."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def _reciprocal(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)
