"""How many heads, neurons, channels and layers stay: from shares and counts, or from a share of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from transformers import PretrainedConfig

from lightllm.compression.structure import Axis, Sizes, Structure

_ROUND_FROM = 512
_ROUND_TO = 32
"""From so many neurons or channels on, a share keeps a multiple of 32: matrix kernels like it, and groups of 32
weights that share a scale need it."""


class Removal(NamedTuple):
    """What is to go: of each kind a share (a float between 0 and 1) or a count (an integer); 0 is nothing."""

    layers: int | float = 0
    heads: int | float = 0
    """Key/value heads, each with the query heads that read it; in every layer as many."""
    neurons: int | float = 0
    """Of the MLPs; in every layer as many."""
    channels: int | float = 0
    """Of the residual stream."""
    parameters: float | None = None
    """Share of all parameters, at least; neurons go until it is reached, beside what else goes."""


def check_removal(removal: Removal) -> None:
    """Refuse what no network can have.

    Raises:
        ValueError: A share or count out of its range, or nothing to remove; the message says what would do.
    """
    for name, value in removal._asdict().items():
        if value is None:
            continue
        count = isinstance(value, int) and not isinstance(value, bool) and name != "parameters"
        if not (value >= 0 if count else isinstance(value, float) and 0 <= value < 1):
            how = "a share below 1" if name == "parameters" else "a share between 0 and 1 (0.25) or a count (2)"
            raise ValueError(f"{name} is {value}: give {how}")
    if removal.parameters is not None and removal.neurons:
        raise ValueError(
            f"neurons is {removal.neurons} and parameters is {removal.parameters}, but neurons are what makes up the "
            "share of parameters: give one of the two"
        )
    if not any(removal):
        raise ValueError("nothing is to be removed: give layers, heads, neurons, channels or parameters")


def kept_sizes(structure: Structure, removal: Removal) -> Sizes:
    """How many of each stay.

    A share keeps the nearest number with which transformers builds such a network (a llama's width must be divisible
    by the number of its query heads), and of 512 neurons or channels and more a multiple of 32 where one is near. A
    count is taken as it is.

    Raises:
        ValueError: More is to go than there is, a share of so few that it is none of them, or a count with which
            transformers builds no such network; the message says what would do.
    """
    dense = structure.sizes
    sizes = dense._replace(layers=_kept("layers", dense.layers, removal.layers))
    sizes = sizes._replace(heads=_kept("heads", dense.heads, removal.heads))
    sizes = sizes._replace(channels=_kept("channels", dense.channels, removal.channels))
    if removal.channels:
        sizes = _built_by_transformers(structure, sizes, "channels", removal.channels)
    else:
        sizes = _built_by_transformers(structure, sizes, "heads", removal.heads)
    if removal.parameters is None:
        return sizes._replace(neurons=_kept("neurons", dense.neurons, removal.neurons))
    return sizes._replace(neurons=_neurons_for(structure, sizes, removal.parameters))


def num_parameters(structure: Structure, sizes: Sizes) -> int:
    """Parameters of the network when so many of each are left, exactly."""
    rows = {
        Axis.QUERY: sizes.heads * structure.width(Axis.QUERY),
        Axis.KEY: sizes.heads * structure.width(Axis.KEY),
        Axis.NEURON: sizes.neurons,
        Axis.CHANNEL: sizes.channels,
    }
    total = 0
    for weight in structure.weights():
        if weight.layer is None or weight.layer < sizes.layers:  # layers are alike
            shape = weight.parameter.shape
            total += prod(rows.get(axis, size) for axis, size in zip(weight.axes, shape, strict=True))
    return total


def configuration_changes(structure: Structure, sizes: Sizes) -> dict[str, int]:
    """What transformers' configuration says of a network of these sizes, by field."""
    return {
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads * structure.queries_per_head,
        "num_key_value_heads": sizes.heads,
        "head_dim": structure.head_dim,  # which else would be the width by the number of heads
        "intermediate_size": sizes.neurons,
        "hidden_size": sizes.channels,
    }


def _kept(name: str, total: int, removed: int | float) -> int:
    """How many of `total` stay when a share or a count of them is removed."""
    if isinstance(removed, int):
        if removed >= total:
            raise ValueError(f"{name} is {removed}, and the network has {total}: at least one must stay")
        return total - removed
    kept = _nearest(total * (1 - removed), total, lambda _: True)
    assert kept is not None
    if removed and kept == total:
        raise ValueError(f"{name} is {removed}, and of {total} that is nearest to none: give a larger share or a count")
    return kept


def _nearest(target: float, total: int, accepted: Callable[[int], bool]) -> int | None:
    """The number up to `total` that is accepted and nearest to `target`, and a multiple of 32 if one is near."""
    for step, reach in ((_ROUND_TO, total / 16), (1, total)) if total >= _ROUND_FROM else ((1, total),):
        for number in sorted(range(step, total + 1, step), key=lambda one: abs(one - target)):
            if abs(number - target) > reach:
                break
            if accepted(number):
                return number
    return None


def _built_by_transformers(structure: Structure, sizes: Sizes, name: str, removed: int | float) -> Sizes:
    """The sizes, or for a share the nearest ones, with which transformers builds a network."""

    def refusal(number: int) -> str | None:
        try:
            _configuration(structure, sizes._replace(**{name: number}))
        except ValueError as error:
            return str(error)
        return None

    number, total = getattr(sizes, name), getattr(structure.sizes, name)
    if (reason := refusal(number)) is None:
        return sizes
    if isinstance(removed, float) and removed:
        nearest = _nearest(number, total - 1, lambda one: refusal(one) is None)
        if nearest is not None:
            return sizes._replace(**{name: nearest})
    near = sorted((one for one in range(1, total) if refusal(one) is None), key=lambda one: abs(one - number))
    possible = [str(total - one) for one in sorted(near[:6], reverse=True)]
    raise ValueError(
        f"{name} is {removed}, which leaves {number}, and transformers builds no such network ({reason}): "
        f"{'remove ' + ', '.join(possible) if possible else 'remove none of them'}"
    )


def _configuration(structure: Structure, sizes: Sizes) -> PretrainedConfig:
    """The configuration of a network of these sizes, with all its layers.

    Raises:
        ValueError: Transformers refuses it; the message is its own.
    """
    changes = configuration_changes(structure, sizes._replace(layers=structure.sizes.layers))
    try:
        return type(structure.config)(**(structure.config.to_dict() | changes))
    except Exception as error:  # what transformers checks with has errors of its own, which are no ValueError
        raise ValueError(str(error).splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")) from error


def _neurons_for(structure: Structure, sizes: Sizes, share: float) -> int:
    """The most neurons that may stay so that at least `share` of all parameters goes."""
    without = num_parameters(structure, sizes._replace(neurons=0))
    each = num_parameters(structure, sizes._replace(neurons=1)) - without
    dense = num_parameters(structure, structure.sizes)
    target = (dense * (1 - share) - without) / each
    total = structure.sizes.neurons
    if target > total:
        raise ValueError(
            f"parameters is {share}, and what else is removed is {1 - num_parameters(structure, sizes) / dense:.3f} of "
            "them already: raise it, or remove less"
        )
    if target < 1:
        most = 1 - (without + each) / dense
        raise ValueError(
            f"parameters is {share}, and with all MLP neurons but one no more than {most:.3f} of them go: remove "
            "layers, heads or channels too"
        )
    step = _ROUND_TO if total >= _ROUND_FROM and target >= _ROUND_TO else 1
    return int(target // step) * step
