"""Taking layers out of a network, which stays an ordinary network of its architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lightllm.models.anatomy import blocks, transformers_network


def keep_layers(network: nn.Module, indices: Sequence[int]) -> PreTrainedModel:
    """Remove all layers but some, in place: from the stack, and from what the configuration says of each layer.

    Args:
        network: A transformers network.
        indices: The layers to keep, ascending, counted from 0.

    Returns:
        The same network.

    Raises:
        ValueError: The network is a module of one's own, or its architecture makes its layers unalike in a way that
            its configuration says by number: what would be saved could not be loaded.
    """
    base = transformers_network(network)
    stack = blocks(base)
    config = base.config.get_text_config()
    num_layers = len(stack)
    if config.num_hidden_layers != num_layers or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(f"{type(base).__name__} does more with the number of a layer than to count: no subset of it")
    kept = set(indices)
    for index in reversed(range(num_layers)):
        if index not in kept:
            del stack[index]
    for index, block in enumerate(stack):
        for module in block.modules():
            if "layer_idx" in vars(module):  # where its keys and values are in the cache
                vars(module)["layer_idx"] = index
    config.num_hidden_layers = len(stack)
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == num_layers:  # one for each layer
            setattr(config, name, type(value)(value[index] for index in sorted(kept)))
    with torch.device("meta"):
        again = type(base)(base.config)
    if {name for name, _ in again.named_parameters()} != {name for name, _ in base.named_parameters()}:
        raise ValueError(
            f"{type(base).__name__} gives layers different parts by their number, so that layers {sorted(kept)} of it "
            "make no network of its architecture: take others"
        )
    return base
