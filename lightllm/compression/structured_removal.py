"""Cutting heads, neurons, hidden channels and layers out of a network, which becomes a smaller one of its kind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightllm.compression.structure import Axis, Sizes, Structure, structure_of
from lightllm.compression.structured_sizes import configuration_changes
from lightllm.models.layer_removal import keep_layers


class Kept(NamedTuple):
    """What stays of a network: indices (int32), ascending, counted from 0 in the network as it was."""

    layers: Tensor
    """`[layers]`."""
    heads: Tensor
    """`[layers, heads]`: of each layer that stays, the key/value heads that stay, each with its query heads."""
    neurons: Tensor
    """`[layers, neurons]`."""
    channels: Tensor
    """`[channels]`: the same in all layers, since all read and write one residual stream."""
    norm_factors: Tensor
    """`[2 * layers + 1]`: by what the weights of each norm of the residual stream are multiplied; see `remove`."""


def everything(structure: Structure) -> Kept:
    """All of it stays."""
    layers, heads, neurons, channels = structure.sizes
    return Kept(
        torch.arange(layers, dtype=torch.int32),
        torch.arange(heads, dtype=torch.int32).repeat(layers, 1),
        torch.arange(neurons, dtype=torch.int32).repeat(layers, 1),
        torch.arange(channels, dtype=torch.int32),
        torch.ones(2 * layers + 1),
    )


def remove(network: nn.Module, kept: Kept) -> None:
    """Take out all that does not stay, in place; the configuration says so, so that transformers loads the result.

    Heads, neurons and layers take what they add to the residual stream with them, and change nothing else. Channels
    change more: each norm divides by the root mean square over all of them, and those that stay have another mean
    square than all had. The weights of each norm are multiplied by a factor for this: the mean over tokens of the
    ratio of the two roots, which is the best one factor in the sense of least squares. It is 1 where no channel goes.

    Args:
        network: A network that `structure_of` knows, or a copy of it on which this was not done yet.
        kept: What stays.

    Raises:
        ValueError: The network is not known, or is smaller than the one that the indices were found on.
    """
    structure = structure_of(network)
    _check_indices(structure, kept)
    keep_layers(network, kept.layers.tolist())
    tied, widths = structure.tied, {axis: structure.width(axis) for axis in Axis}
    for weight in list(structure.weights()):
        values = weight.parameter.detach()
        for dimension, axis in enumerate(weight.axes):
            units = _units(kept, axis, weight.layer)
            if units is not None:
                values = values.index_select(dimension, _rows(units, widths[axis]).to(values.device))
        _replace(weight.module, weight.name, values)
    if tied:
        structure.head.weight = structure.embedding.weight
    for norm, factor in zip(structure.norms, kept.norm_factors.tolist(), strict=True):
        with torch.no_grad():
            norm.get_parameter("weight").mul_(factor)
    _tell(structure, kept)


def _units(kept: Kept, axis: Axis, layer: int | None) -> Tensor | None:
    """The units that stay on an axis; None where all do."""
    if axis is Axis.CHANNEL:
        return kept.channels
    if axis is Axis.OTHER:
        return None
    assert layer is not None
    return (kept.neurons if axis is Axis.NEURON else kept.heads)[layer]


def _rows(units: Tensor, width: int) -> Tensor:
    """The rows of `units` where each takes `width` of them: `[units * width]`."""
    return (units.long()[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _replace(module: nn.Module, name: str, values: Tensor) -> None:
    old = module.get_parameter(name)
    if old.shape != values.shape:
        setattr(module, name, nn.Parameter(values.contiguous(), requires_grad=old.requires_grad))


def _tell(structure: Structure, kept: Kept) -> None:
    """Say the new sizes wherever a module or the configuration repeats them."""
    layers, heads = kept.heads.shape
    sizes = configuration_changes(structure, Sizes(layers, heads, kept.neurons.shape[1], len(kept.channels)))
    for name, value in sizes.items():
        setattr(structure.config, name, value)
    for module in structure.network.modules():
        for name in {"hidden_size", "intermediate_size"} & set(vars(module)):
            vars(module)[name] = sizes[name]
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    structure.embedding.embedding_dim = len(kept.channels)


def _check_indices(structure: Structure, kept: Kept) -> None:
    for name, size in structure.sizes._asdict().items():
        indices = getattr(kept, name)
        if indices.numel() == 0 or int(indices.min()) < 0 or int(indices.max()) >= size:
            raise ValueError(
                f"the {name} that were kept are not those of this network, which has {size}: it is not the network "
                "that was pruned"
            )
