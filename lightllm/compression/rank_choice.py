"""How many components each layer keeps: by energy, by a budget of parameters, or as it is said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Of a layer's weight."""

    num_outputs: int
    num_inputs: int

    @property
    def num_parameters(self) -> int:
        """Of the whole matrix."""
        return self.num_outputs * self.num_inputs

    @property
    def num_parameters_per_rank(self) -> int:
        """What a component costs."""
        return self.num_outputs + self.num_inputs

    @property
    def largest_saving_rank(self) -> int:
        """The largest rank at which two thin matrices have fewer parameters than the whole one; 0 if none has."""
        return (self.num_parameters - 1) // self.num_parameters_per_rank


@dataclass(frozen=True)
class RankChoice:
    """What decides how many components a layer keeps; `energy` or `budget`, and `by_layer` beside it or alone.

    Args:
        energy: The smallest rank whose squared singular values add up to this share of all of the layer's.
        budget: Parameters of the thin matrices, as a share of those of the layers that they replace.
        allocation: Of a budget: `uniform` gives each layer its share of its own parameters; `global` gives the
            layers' components ranks by what they are worth for their parameters, each as a share of its layer's
            energy, and leaves a layer whole where thin matrices would be no smaller. Energy is not loss: where a few
            tokens have outputs much larger than all others, they decide, and `uniform` may do better.
        by_layer: Ranks by regular expressions of layers' names; the first that matches a name somewhere decides, and
            where there is neither energy nor budget, layers that none matches stay whole.

    Raises:
        ValueError: Nothing decides, or both do, or a number is out of its range.
    """

    energy: float | None = None
    budget: float | None = None
    allocation: Literal["uniform", "global"] = "uniform"
    by_layer: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.energy is not None and self.budget is not None:
            raise ValueError("energy and budget both decide the ranks: give one of them")
        if self.energy is None and self.budget is None and not self.by_layer:
            raise ValueError("nothing decides the ranks: give energy, budget or by_layer")
        for name, share in (("energy", self.energy), ("budget", self.budget)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} is {share}: give a share above 0 and below 1")
        if self.allocation == "global" and self.budget is None:
            raise ValueError("allocation: global spends a budget, and there is none: give one")
        for pattern, rank in self.by_layer.items():
            if rank < 1:
                raise ValueError(f"by_layer gives {pattern!r} rank {rank}: give at least 1")

    @property
    def needs_values(self) -> bool:
        """Whether ranks depend on singular values, and not on shapes alone."""
        return self.energy is not None or self.allocation == "global"

    def ranks(self, shapes: Mapping[str, Shape], values: Mapping[str, Tensor]) -> dict[str, int]:
        """The rank of every layer that is to be replaced; those that are not in it stay whole.

        Args:
            shapes: Of the layers' weights, by name.
            values: The layers' singular values, descending; empty where `needs_values` is false.

        Raises:
            ValueError: An expression of `by_layer` matches nothing, or its rank would save nothing.
        """
        named = self._named(shapes)
        others = {name: shape for name, shape in shapes.items() if name not in named}
        chosen: dict[str, int] = {}
        if self.allocation == "global" and self.budget is not None:
            chosen = ranks_for_total(others, values, self.budget)
        elif self.budget is not None:
            chosen = {name: rank_for_share(shape, self.budget) for name, shape in others.items()}
        elif self.energy is not None:
            chosen = {name: rank_for_energy(values[name], self.energy) for name in others}
        saving = {name: rank for name, rank in chosen.items() if 1 <= rank <= shapes[name].largest_saving_rank}
        return {name: (named | saving)[name] for name in shapes if name in named or name in saving}

    def _named(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        for pattern in self.by_layer:
            if not any(re.search(pattern, name) for name in shapes):
                raise ValueError(
                    f"by_layer: no layer's name matches {pattern!r}; {next(iter(shapes), 'none')!r} is one"
                )
        named = {}
        for name, shape in shapes.items():
            rank = next((rank for pattern, rank in self.by_layer.items() if re.search(pattern, name)), None)
            if rank is not None and rank > shape.largest_saving_rank:
                raise ValueError(
                    f"by_layer: rank {rank} of {name}, which is {shape.num_outputs} by {shape.num_inputs}, saves no "
                    f"parameters: give at most {shape.largest_saving_rank}, or name it in leave_out"
                )
            if rank is not None:
                named[name] = rank
        return named


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank whose squared singular values add up to a share of their sum.

    Args:
        values: `[n]`, descending.
        energy: The share, between 0 and 1.
    """
    kept = values.double().square().cumsum(0)
    return int(torch.searchsorted(kept, energy * kept[-1]).clamp(max=len(values) - 1)) + 1


def rank_for_share(shape: Shape, budget: float) -> int:
    """The largest rank whose two thin matrices have at most a share of the whole one's parameters; 0 if none has."""
    return int(budget * shape.num_parameters / shape.num_parameters_per_rank)


def ranks_for_total(shapes: Mapping[str, Shape], values: Mapping[str, Tensor], budget: float) -> dict[str, int]:
    """Ranks of all layers out of one budget, which goes to the components that are worth most for their parameters.

    A component's worth is its share of the energy of its layer (so that a layer with large outputs is not a more
    important one), divided by the parameters that it takes. All components above a common worth are kept, the lowest
    at which the total is within the budget: no other ranks of the same total lose less. A layer's last step is to stay
    whole, which costs what is left to its full number of parameters.

    Args:
        shapes: Of the layers' weights, by name.
        values: The layers' singular values, descending, by name.
        budget: Parameters of all layers together, as a share of those of the whole matrices.

    Returns:
        The rank of each layer, at least 1; layers that stay whole are not in it.
    """
    steps = {name: _steps(shape, values[name]) for name, shape in shapes.items()}
    limit = budget * sum(shape.num_parameters for shape in shapes.values())
    least = 0.0
    spent = sum(step.cost for one in steps.values() for step in one if step.worth == float("inf"))
    free = sorted((step for one in steps.values() for step in one if step.worth < float("inf")), reverse=True)
    for step in free:
        spent += step.cost
        if spent > limit:
            least = step.worth  # neither this one nor what is worth the same
            break
    kept = {name: [step for step in one if step.worth > least] for name, one in steps.items()}
    return {name: len(one) for name, one in kept.items() if not any(step.makes_whole for step in one)}


class _Step(NamedTuple):
    """One component more, or all that are left."""

    worth: float
    """Share of the layer's energy for a parameter; the first component has no price."""
    cost: int
    """Parameters."""
    makes_whole: bool


def _steps(shape: Shape, values: Tensor) -> list[_Step]:
    """The steps by which a layer becomes whole, each worth less than the one before it."""
    squares = values.double().square()
    shares = (squares / squares.sum()).tolist()
    price = shape.num_parameters_per_rank
    steps = [_Step(float("inf"), price, False)]
    for rank in range(1, shape.largest_saving_rank + 1):
        rest = _Step(
            sum(shares[rank:]) / (shape.num_parameters - rank * price), shape.num_parameters - rank * price, True
        )
        if rank == shape.largest_saving_rank or rest.worth >= shares[rank] / price:
            return [*steps, rest]
        steps.append(_Step(shares[rank] / price, price, False))
    return [_Step(float("inf"), shape.num_parameters, True)]  # even one component would be no smaller
