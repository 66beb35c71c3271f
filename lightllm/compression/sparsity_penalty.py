"""Penalties that draw weights to zero, alone or in groups, with their gradients in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightllm.compression.units import Units

Weights = Mapping[str, Tensor]
"""The weights of a set of layers by name, `[out, in]` each."""


class WeightPenalty(ABC):
    """A penalty that is a function of weights alone: a sum over groups of them, of which one is in a set of layers."""

    @abstractmethod
    def sets(self, layers: Sequence[str]) -> list[tuple[str, ...]]:
        """Which of the layers have to be looked at together."""

    @abstractmethod
    def value(self, weights: Weights) -> Tensor:
        """The penalty of one set, a scalar."""

    @abstractmethod
    def gradients(self, weights: Weights) -> dict[str, Tensor]:
        """Its gradient by each weight, `[out, in]`; 0 where a norm is 0."""

    @abstractmethod
    def sizes(self, weights: Weights) -> Tensor:
        """How large each group is, `[groups]`: the root of the mean square of its weights."""

    @abstractmethod
    def spread(self, values: Tensor, weights: Weights) -> dict[str, Tensor]:
        """One value a group, `[groups]`, for each weight of the group: `[out, in]` by name."""


class AbsoluteSum(WeightPenalty):
    """The sum of the weights' absolute values; each weight is a group of its own."""

    @override
    def sets(self, layers: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in layers]

    @override
    def value(self, weights: Weights) -> Tensor:
        (weight,) = weights.values()
        return weight.abs().sum()

    @override
    def gradients(self, weights: Weights) -> dict[str, Tensor]:
        return {name: weight.sign() for name, weight in weights.items()}

    @override
    def sizes(self, weights: Weights) -> Tensor:
        (weight,) = weights.values()
        return weight.abs().flatten()

    @override
    def spread(self, values: Tensor, weights: Weights) -> dict[str, Tensor]:
        return {name: values.view_as(weight) for name, weight in weights.items()}


class RowLasso(WeightPenalty):
    """Group lasso over the rows of a weight: the sum of `sqrt(in) * |row|_2`."""

    @override
    def sets(self, layers: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in layers]

    @override
    def value(self, weights: Weights) -> Tensor:
        (weight,) = weights.values()
        return weight.shape[1] ** 0.5 * weight.norm(dim=1).sum()

    @override
    def gradients(self, weights: Weights) -> dict[str, Tensor]:
        return {
            name: weight.shape[1] ** 0.5 * _divided(weight, weight.norm(dim=1, keepdim=True))
            for name, weight in weights.items()
        }

    @override
    def sizes(self, weights: Weights) -> Tensor:
        (weight,) = weights.values()
        return weight.square().mean(1).sqrt()

    @override
    def spread(self, values: Tensor, weights: Weights) -> dict[str, Tensor]:
        return {name: values[:, None].expand_as(weight) for name, weight in weights.items()}


class UnitLasso(WeightPenalty):
    """Group lasso over neurons or heads: the sum of `sqrt(n) * |unit|_2` with all `n` weights of a unit, in all layers.

    Args:
        units: Those that are penalised.
    """

    def __init__(self, units: Sequence[Units]) -> None:
        self._units = {one.layers: one for one in units}

    @override
    def sets(self, layers: Sequence[str]) -> list[tuple[str, ...]]:
        return list(self._units)

    @override
    def value(self, weights: Weights) -> Tensor:
        units = self._units[tuple(weights)]
        return units.num_weights(weights) ** 0.5 * units.squared_norms(weights).sqrt().sum()

    @override
    def gradients(self, weights: Weights) -> dict[str, Tensor]:
        units = self._units[tuple(weights)]
        norms = units.spread(units.squared_norms(weights).sqrt(), weights)
        scale = units.num_weights(weights) ** 0.5
        return {name: scale * _divided(weight, norms[name]) for name, weight in weights.items()}

    @override
    def sizes(self, weights: Weights) -> Tensor:
        units = self._units[tuple(weights)]
        return (units.squared_norms(weights) / units.num_weights(weights)).sqrt()

    @override
    def spread(self, values: Tensor, weights: Weights) -> dict[str, Tensor]:
        return self._units[tuple(weights)].spread(values, weights)


def _divided(weight: Tensor, norms: Tensor) -> Tensor:
    """`weight / norms`, 0 where the norm is."""
    return weight * torch.where(norms > 0, 1 / norms, 0)
