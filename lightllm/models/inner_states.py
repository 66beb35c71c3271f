"""What a network computes on its way to the last hidden state, for losses that look inside."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lightllm.models.anatomy import blocks, input_embedding, unwrapped

Vectors = Literal["query", "key", "value"]

_PROJECTIONS: dict[Vectors, tuple[str, ...]] = {
    "query": ("q_proj", "query"),
    "key": ("k_proj", "key"),
    "value": ("v_proj", "value"),
}
"""How architectures name the layer that makes each kind of vector in attention."""


class InnerStates(NamedTuple):
    """What was computed in a network's last call; filled while it runs."""

    hidden: dict[int, Tensor]
    """Hidden states `[batch, seq, hidden]` by layer: 0 is the embedding's, i is what the i-th block returns."""
    vectors: dict[tuple[int, Vectors], Tensor]
    """Queries, keys or values `[batch, seq, width]` of all heads, before any rotation, by block from 1 and kind."""


@contextmanager
def inner_states(
    network: nn.Module, layers: Collection[int] = (), vectors: Collection[tuple[int, Vectors]] = ()
) -> Iterator[InnerStates]:
    """Keep inner states of every call of the network within the context, with their gradients.

    Args:
        network: The network.
        layers: Layers whose hidden states are kept: 0 for the embedding, i for the i-th block.
        vectors: Blocks, counted from 1, and which of their vectors are kept.

    Raises:
        ValueError: A layer that the network does not have, or a block without layers that make these vectors alone.
    """
    states = InnerStates({}, {})
    handles = []
    try:
        for layer in layers:
            module = input_embedding(network) if layer == 0 else _block(network, layer)
            handles.append(module.register_forward_hook(_keep(states.hidden, layer)))
        for layer, kind in vectors:
            projection = _projection(network, layer, kind)
            handles.append(projection.register_forward_hook(_keep(states.vectors, (layer, kind))))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def layer_index(network: nn.Module, layer: int) -> int:
    """The index of a layer from 0 (the embedding), where -1 is the last block.

    Raises:
        ValueError: The network has no such layer.
    """
    num_blocks = len(blocks(network))
    if not -num_blocks - 1 <= layer <= num_blocks:
        raise ValueError(
            f"no layer {layer} in {type(unwrapped(network)).__name__}: 0 is its embedding, {num_blocks} its last block"
        )
    return layer + num_blocks + 1 if layer < 0 else layer


def _block(network: nn.Module, layer: int) -> nn.Module:
    return blocks(network)[layer_index(network, layer) - 1]


def _projection(network: nn.Module, layer: int, kind: Vectors) -> nn.Module:
    names = _PROJECTIONS[kind]
    found = [module for name, module in _block(network, layer).named_modules() if name.split(".")[-1] in names]
    if layer == 0 or len(found) != 1:
        raise ValueError(
            f"layer {layer} of {type(unwrapped(network)).__name__} has no one layer named {' or '.join(names)} that "
            f"makes the {kind} vectors: compare hidden states instead"
        )
    return found[0]


def _keep(kept: dict[Any, Tensor], key: object) -> Callable[[nn.Module, object, Any], None]:
    def hook(_: nn.Module, __: object, output: Any) -> None:
        kept[key] = output if isinstance(output, Tensor) else output[0]

    return hook
