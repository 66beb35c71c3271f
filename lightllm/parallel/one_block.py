"""A network like another with a single block, on the meta device: what one device has to compute again and again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightllm.models.adapters import Adapter, Frozen, Full
from lightllm.models.anatomy import OwnNetwork, blocks, output_head, unwrapped
from lightllm.models.document_attention import BY_DOCUMENT


def one_block(
    network: nn.Module,
    adapter: Adapter,
    tensor_degree: int = 1,
    low_bit: bool = False,
    dtype: torch.dtype | None = None,
) -> Callable[[], nn.Module]:
    """A function that makes a network like this one with one block: what one device of a tensor-parallel group has.

    Args:
        network: The network as it is built, on the meta device, without its adapter.
        adapter: What is attached to it.
        tensor_degree: Ranks that share the matrices of a layer: each has as many heads and neurons less.
        low_bit: Whether an adapter's base weights are stored in few bits; peft's own layer goes around them.
        dtype: All weights have it while they compute, where that is not their own.
    """
    # Which blocks are frozen is for the whole network to say; one that trains is looked at.
    attached = Full() if isinstance(adapter, Frozen) else adapter

    def make() -> nn.Module:
        made = _own(network) if isinstance(network, OwnNetwork) else _thin(network, tensor_degree)
        if low_bit:
            vars(made)["is_quantized"] = True
        adapted = attached.attach(made)
        return adapted if dtype is None else adapted.to(dtype=dtype)

    return make


def _own(network: OwnNetwork) -> OwnNetwork:
    single = copy.deepcopy(network)
    del blocks(single)[1:]
    return single


def _thin(network: nn.Module, tensor_degree: int) -> PreTrainedModel:
    base = unwrapped(network)
    assert isinstance(base, PreTrainedModel)
    attention = base.config._attn_implementation
    with torch.device("meta"):
        made = type(base)._from_config(
            thin_config(base.config, tensor_degree),
            dtype=output_head(base).weight.dtype,
            attn_implementation="sdpa" if attention == BY_DOCUMENT else attention,
        )
    made.config.use_cache = False
    return made


def thin_config(config: PreTrainedConfig, tensor_degree: int, num_blocks: int = 1) -> PreTrainedConfig:
    """The configuration of a rank's share of a network: fewer heads and neurons, and few blocks.

    Raises:
        ValueError: Heads or neurons do not divide by the degree.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # one for each layer
            setattr(text, name, value[:num_blocks])
    text.num_hidden_layers = num_blocks
    if tensor_degree == 1:
        return config
    if getattr(text, "head_dim", None) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(text, name, None)
        if size is None:
            continue
        if size % tensor_degree:
            raise ValueError(f"{name} {size} does not divide by a tensor degree of {tensor_degree}")
        setattr(text, name, size // tensor_degree)
    return config
