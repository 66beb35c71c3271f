"""Neurons and attention heads in the weights of a block: which rows make a unit, and which columns read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightllm.models.anatomy import transformers_network

UnitKind = Literal["neurons", "heads"]
"""`neurons` of the MLPs; `heads`: key/value heads, each with the query heads that read it."""

_WRITERS: dict[UnitKind, tuple[str, ...]] = {
    "neurons": ("gate_proj", "up_proj"),
    "heads": ("q_proj", "k_proj", "v_proj"),
}
_READERS: dict[UnitKind, str] = {"neurons": "down_proj", "heads": "o_proj"}


class Units(NamedTuple):
    """All neurons of an MLP, or all heads of an attention layer."""

    kind: UnitKind
    number: int
    writers: tuple[str, ...]
    """The layers of which each unit has rows: `out / number` that follow each other."""
    reader: str
    """The layer of which each unit has columns: `in / number` that follow each other."""

    @property
    def layers(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.writers, self.reader)

    def num_weights(self, weights: Mapping[str, Tensor]) -> int:
        """How many weights a unit has in all of its layers."""
        return sum(weights[name].numel() for name in self.layers) // self.number

    def squared_norms(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The sum of the squares of each unit's weights, `[units]`.

        Args:
            weights: By the names of the layers, `[out, in]`.
        """
        lines = [*(weights[name].square().sum(1) for name in self.writers), weights[self.reader].square().sum(0)]
        return torch.stack([one.view(self.number, -1).sum(1) for one in lines]).sum(0)

    def spread(self, values: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One value a unit, `[units]`, for each of its weights: `[out, in]` by the layers' names."""
        found = {}
        for name in self.layers:
            out, width = weights[name].shape
            lines = values.repeat_interleave((width if name == self.reader else out) // self.number)
            found[name] = (lines[None] if name == self.reader else lines[:, None]).expand(out, width)
        return found


def find_units(network: nn.Module, layers: Iterable[str], kinds: Iterable[UnitKind]) -> list[Units]:
    """The units of some of the network's layers, in their order; a layer of thin matrices has them on its outer side.

    Args:
        network: A transformers network of llama's parts, adapted or not.
        layers: Names of linear layers in the plain network.
        kinds: Which units.

    Raises:
        ValueError: The network has no such units, or only a part of their layers is among those named.
    """
    kinds, known = list(kinds), set(layers)
    if not kinds:
        return []
    base = transformers_network(network)
    widths = {name: module.out_features for name, module in base.named_modules() if name in known}
    found = []
    for kind in kinds:
        ends = f".{_READERS[kind]}", f".{_READERS[kind]}.down"
        readers = {name: name[: name.rindex(ends[0])] for name in widths if name.endswith(ends)}
        if not readers:
            raise ValueError(
                f"no {_READERS[kind]} is among the layers of this {type(base).__name__} that are to become sparse, and "
                f"that is what reads {kind}: leave {_READERS[kind]} in, or take another choice"
            )
        for reader, parent in readers.items():
            writers = tuple(_writer(f"{parent}.{name}", known, reader) for name in _WRITERS[kind])
            count = widths[writers[-1]] if kind == "neurons" else base.config.get_text_config().num_key_value_heads
            assert isinstance(count, int)
            found.append(Units(kind, count, writers, reader))
    return found


def _writer(name: str, layers: set[str], reader: str) -> str:
    for candidate in (name, f"{name}.up"):
        if candidate in layers:
            return candidate
    raise ValueError(
        f"{reader} reads what {name} writes too, and only one of them is to become sparse: leave out both or none"
    )
