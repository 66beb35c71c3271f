"""Structured pruning: what matters least in a network is found, and taken out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.compression.structure import Structure, structure_of
from lightllm.compression.structured_importance import Importance, norm_factors, scores
from lightllm.compression.structured_removal import Kept, everything, remove
from lightllm.compression.structured_sizes import Removal, kept_sizes
from lightllm.models.layer_removal import keep_layers


def prune(
    network: nn.Module,
    removal: Removal,
    importance: Importance,
    batches: Sequence[TextBatch],
    leave_out: Sequence[int] = (),
) -> Kept:
    """Find the heads, neurons, channels and layers that matter least, and take them out, in place.

    Layers go first: what is in the others is measured in the network without them.

    Args:
        network: A network that `structure_of` knows.
        removal: How much of each goes.
        importance: See `scores`.
        batches: Calibration data, of which importance by magnitude needs none.
        leave_out: Layers that stay in any case, counted from 0; -1 is the last.

    Returns:
        What stays: with it, `remove` does the same to the same network again.

    Raises:
        ValueError: The network is not known, has not so much to remove, or there is no data to measure it on.
    """
    structure = structure_of(network)
    sizes = kept_sizes(structure, removal)
    layers = torch.arange(structure.sizes.layers)
    if sizes.layers < len(layers):
        layers = _layers(structure, scores(structure, importance, batches).layers, sizes.layers, leave_out)
        keep_layers(network, layers.tolist())
    if sizes == structure.sizes:
        return everything(structure)._replace(layers=layers)
    found = scores(structure, importance, batches)
    heads, neurons = _highest(found.heads, sizes.heads), _highest(found.neurons, sizes.neurons)
    channels = _highest(found.channels, sizes.channels)
    factors = norm_factors(structure, channels, batches).float()
    remove(network, Kept(torch.arange(sizes.layers), heads, neurons, channels, factors))
    return Kept(layers, heads, neurons, channels, factors)


def _layers(structure: Structure, found: Tensor, number: int, leave_out: Sequence[int]) -> Tensor:
    """The layers that stay."""
    num_layers = structure.sizes.layers
    for layer in leave_out:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"leave_out has layer {layer}, and the network has {num_layers}, counted from 0")
    stay = {layer % num_layers for layer in leave_out}
    if len(stay) > number:
        raise ValueError(
            f"leave_out has {len(stay)} layers, and {number} are to stay: remove fewer, or leave out fewer"
        )
    found[list(stay)] = torch.inf
    return _highest(found, number)


def _highest(found: Tensor, number: int) -> Tensor:
    """The indices of the highest along the last dimension, ascending; of equals the first."""
    order = found.argsort(dim=-1, descending=True, stable=True)
    return order[..., :number].sort().values
