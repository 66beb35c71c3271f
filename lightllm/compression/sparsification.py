"""What a run can be regularised by to become sparse: weights, groups of them, or gates on neurons and heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.compression.effective_weight import EffectiveLayer, FixedMask, accumulate_gradient
from lightllm.compression.effects import effective_layers, install_effects
from lightllm.compression.hard_concrete import ColumnGates, open_probability, open_probability_gradient
from lightllm.compression.layers import prunable_layers
from lightllm.compression.sparsity_penalty import AbsoluteSum, RowLasso, UnitLasso, WeightPenalty
from lightllm.compression.units import UnitKind, Units, find_units
from lightllm.models.transformation import Record, Transformation, TransformationKind

GroupKind = Literal["rows", "neurons", "heads"]
"""`rows` of every layer, one output each; `neurons` and `heads` as in `UnitKind`."""


class Share(NamedTuple):
    """How much of what is penalised is zero."""

    num_zero: int
    num_all: int


class Sparsifier(ABC):
    """A penalty on a network in training, and what becomes of it in the end."""

    @property
    @abstractmethod
    def masked(self) -> set[str]:
        """Names of the layers of which something may become zero."""

    @abstractmethod
    def add_gradient(self, strength: float) -> Tensor:
        """Add `strength` times the penalty's gradient to the gradients there are; the penalty itself, a scalar."""

    @abstractmethod
    def share(self, threshold: float) -> Share:
        """How many weights, groups or units `zero` would make zero now."""

    @abstractmethod
    def zero(self, threshold: float) -> None:
        """Make zero for good what is not above a threshold."""


class Sparsity(ABC):
    """A choice of what becomes sparse, and by which penalty."""

    own_learning_rate: float | None = None
    """Of the parameters that only the penalty needs; None where there are none."""

    @abstractmethod
    def install(self, network: nn.Module, leave_out: list[str]) -> None:
        """Put masks or gates on linear layers of the blocks, which change nothing yet.

        Raises:
            ValueError: The network has no such layers or units; the message says why.
        """

    @abstractmethod
    def sparsifier(self, network: nn.Module, leave_out: list[str]) -> Sparsifier:
        """The penalty on a network with what `install` put there."""

    def own_parameters(self, network: nn.Module) -> list[nn.Parameter]:
        """The parameters that `install` added."""
        return []


class Sparsifying(Transformation):
    """Installs what a choice of sparsity needs.

    Args:
        name: Of the transformation.
        sparsity: The choice.
        leave_out: Regular expressions of names of layers that are no part of it.
    """

    kind = TransformationKind.MASK

    def __init__(self, name: str, sparsity: Sparsity, leave_out: list[str]) -> None:
        super().__init__(name)
        self.sparsity = sparsity
        self.leave_out = leave_out

    @override
    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        self.sparsity.install(network, self.leave_out)
        return None


class L1(Sparsity):
    """The sum of the absolute values of all weights: single weights become zero."""

    @override
    def install(self, network: nn.Module, leave_out: list[str]) -> None:
        _mask(network, prunable_layers(network, leave_out))

    @override
    def sparsifier(self, network: nn.Module, leave_out: list[str]) -> Sparsifier:
        return _OfWeights(network, prunable_layers(network, leave_out), [AbsoluteSum()])


class GroupLasso(Sparsity):
    """The sum of the norms of groups of weights, each times the root of the group's size: whole groups become zero.

    Args:
        over: What makes a group: `rows`, `neurons`, `heads`, or several of them.

    Raises:
        ValueError: Nothing is named.
    """

    def __init__(self, over: list[GroupKind]) -> None:
        if not over:
            raise ValueError("over names no groups: give rows, neurons or heads")
        self.over = over

    @override
    def install(self, network: nn.Module, leave_out: list[str]) -> None:
        self._units(network, leave_out)  # refused now, if the network has none
        _mask(network, self._names(network, leave_out))

    @override
    def sparsifier(self, network: nn.Module, leave_out: list[str]) -> Sparsifier:
        units = self._units(network, leave_out)
        penalties: list[WeightPenalty] = [UnitLasso(units)] if units else []
        if "rows" in self.over:
            penalties.append(RowLasso())
        return _OfWeights(network, self._names(network, leave_out), penalties)

    def _units(self, network: nn.Module, leave_out: list[str]) -> list[Units]:
        kinds: list[UnitKind] = [kind for kind in self.over if kind != "rows"]
        return find_units(network, prunable_layers(network, leave_out), kinds)

    def _names(self, network: nn.Module, leave_out: list[str]) -> list[str]:
        names = list(prunable_layers(network, leave_out))
        of_units = {name for one in self._units(network, leave_out) for name in one.layers}
        return names if "rows" in self.over else [name for name in names if name in of_units]


class HardConcrete(Sparsity):
    """The expected number of open gates, one on every neuron or head (L0 regularisation, arXiv:1712.01312).

    What a unit is worth is set against the strength: roughly, its gate closes if the mean loss per target token rises
    by less than that without the unit.

    Args:
        over: What has gates: `neurons`, `heads`, or both.
        learning_rate: Of the gates' logits, which have to move by several units where weights move by thousandths.
        initial: What the gates would settle to if nothing were learned, between 0 and 1.

    Raises:
        ValueError: Nothing is named, or a number is out of its range.
    """

    def __init__(self, over: list[UnitKind], learning_rate: float = 0.05, initial: float = 0.95) -> None:
        if not over:
            raise ValueError("over names no units: give neurons, heads or both")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate is {learning_rate}: give one above 0, such as 0.05")
        if not 0 < initial < 1:
            raise ValueError(f"initial is {initial}: give a number above 0 and below 1, such as 0.95")
        self.over = over
        self.own_learning_rate = learning_rate
        self.initial = initial

    @override
    def install(self, network: nn.Module, leave_out: list[str]) -> None:
        for units in find_units(network, prunable_layers(network, leave_out), self.over):
            _mask(network, units.writers)
            reader = install_effects(network, [units.reader])[units.reader]
            if reader.effect.masking is not None:
                raise ValueError(
                    f"{units.reader} is masked already, and gates would be a second mask: prune other layers"
                )
            width = reader.base.in_features // units.number
            reader.effect.masking = ColumnGates(units.number, width, self.initial, reader.base.weight.device)

    @override
    def sparsifier(self, network: nn.Module, leave_out: list[str]) -> Sparsifier:
        return _OfGates(network, find_units(network, prunable_layers(network, leave_out), self.over))

    @override
    def own_parameters(self, network: nn.Module) -> list[nn.Parameter]:
        return [module.logits for module in network.modules() if isinstance(module, ColumnGates)]


class _OfWeights(Sparsifier):
    """Penalties on merged weights, of which one set of layers is in memory at a time."""

    def __init__(self, network: nn.Module, names: Iterable[str], penalties: Sequence[WeightPenalty]) -> None:
        layers = effective_layers(network)
        self.layers: dict[str, EffectiveLayer] = {name: layers[name] for name in names}
        self.sets = [(penalty, names) for penalty in penalties for names in penalty.sets(list(self.layers))]

    @property
    @override
    def masked(self) -> set[str]:
        return set(self.layers)

    @override
    def add_gradient(self, strength: float) -> Tensor:
        values = []
        for penalty, names in self.sets:
            weights = self._weights(names)
            values.append(penalty.value(weights))
            for name, gradient in penalty.gradients(weights).items():
                self.layers[name].add_merged_gradient(strength * gradient)
        return torch.stack(values).sum()

    @override
    def share(self, threshold: float) -> Share:
        sizes = [penalty.sizes(self._weights(names)) for penalty, names in self.sets]
        return Share(sum(int((one <= threshold).sum()) for one in sizes), sum(map(len, sizes)))

    @override
    def zero(self, threshold: float) -> None:
        for penalty, names in self.sets:
            weights = self._weights(names)
            for name, keep in penalty.spread(penalty.sizes(weights) > threshold, weights).items():
                layer = self.layers[name]
                layer.set_keep(layer.fixed_mask().keep & keep)

    def _weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.layers[name].masked_weight().float() for name in names}


class _OfGates(Sparsifier):
    """The expected number of open gates."""

    def __init__(self, network: nn.Module, units: Sequence[Units]) -> None:
        self.layers = effective_layers(network)
        self.units = units

    @property
    @override
    def masked(self) -> set[str]:
        return {name for one in self.units for name in one.layers}

    @override
    def add_gradient(self, strength: float) -> Tensor:
        values = []
        for one in self.units:
            logits = self._gates(one).logits
            values.append(open_probability(logits.detach().float()).sum())
            accumulate_gradient(logits, strength * open_probability_gradient(logits.detach().float()))
        return torch.stack(values).sum()

    @override
    @torch.no_grad()
    def share(self, threshold: float) -> Share:
        closed = sum(int((self._gates(one).gates <= threshold).sum()) for one in self.units)
        return Share(closed, sum(one.number for one in self.units))

    @override
    @torch.no_grad()
    def zero(self, threshold: float) -> None:
        """Fix the gates; the rows of units whose gate is closed become zero too, as nothing reads them any more."""
        for one in self.units:
            gates = self._gates(one)
            gates.fix(threshold)
            weights = {name: self.layers[name].base.weight for name in one.layers}
            keep = one.spread(gates.gates > 0, weights)
            for name in one.writers:
                layer = self.layers[name]
                layer.set_keep(layer.fixed_mask().keep & keep[name])

    def _gates(self, units: Units) -> ColumnGates:
        gates = self.layers[units.reader].effect.masking
        assert isinstance(gates, ColumnGates)
        return gates


def _mask(network: nn.Module, names: Iterable[str]) -> None:
    """Install masks that keep everything."""
    for layer in install_effects(network, names).values():
        weight = layer.base.weight
        layer.effect.masking = layer.effect.masking or FixedMask(weight.shape, weight.device)
