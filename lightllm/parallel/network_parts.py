"""The parameters of a network by where they lie: in blocks, which are spread alike, and around them."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lightllm.models.anatomy import blocks, input_embedding, output_head, unwrapped


class Weights(NamedTuple):
    """Some of a network's parameters."""

    bytes: float = 0
    trained: float = 0
    """How many of the weights train."""
    trained_bytes: float = 0
    """Of those that train; their gradients have as many."""
    split_bytes: float = 0
    """Of those that ranks of a tensor-parallel group share."""
    split_trained: float = 0
    split_trained_bytes: float = 0
    largest: float = 0
    """The most weights that one trained parameter has."""

    def __add__(self, other: Weights) -> Weights:  # type: ignore[override]
        sums = Weights(*(one + two for one, two in zip(self, other, strict=True)))
        return sums._replace(largest=max(self.largest, other.largest))

    def on_a_rank(self, tensor_degree: int) -> Weights:
        """What one rank of a tensor-parallel group has of them."""
        gone = 1 - 1 / tensor_degree
        return Weights(
            self.bytes - gone * self.split_bytes,
            self.trained - gone * self.split_trained,
            self.trained_bytes - gone * self.split_trained_bytes,
            largest=self.largest / tensor_degree if self.split_trained else self.largest,
        )


@dataclass(frozen=True)
class NetworkParts:
    """A network's parameters, and what a plan must know of its shape."""

    blocks: tuple[Weights, ...]
    embedding: Weights
    head: Weights
    """Nothing where it is tied to the embedding."""
    rest: Weights
    """Norms, positions, adapters outside of blocks."""
    tied: bool
    first_trained: int
    """The first block that a gradient reaches: those before it keep nothing."""
    dividends: tuple[int, ...]
    """Heads, key/value heads and neurons: a tensor degree divides all of them. Empty where there is no tensor plan."""

    @property
    def total(self) -> Weights:
        """All parameters."""
        return sum(self.blocks, self.outside)

    @property
    def outside(self) -> Weights:
        """All but the blocks' parameters."""
        return self.embedding + self.head + self.rest


def network_parts(network: nn.Module, low_bit: float | None = None) -> NetworkParts:
    """Sort a network's parameters.

    Args:
        network: A built network with its adapter, on any device, the meta device too.
        low_bit: Bytes of a frozen weight of the blocks' linear layers, where they are stored in few bits.
    """
    stack = blocks(network)
    plan = _tensor_plan(network)
    embedding, head = input_embedding(network).weight, output_head(network).weight
    owner = {id(parameter): index for index, block in enumerate(stack) for parameter in block.parameters()}
    sizes = [Weights()] * len(stack)
    outside = {"embedding": Weights(), "head": Weights(), "rest": Weights()}
    packed = _linear_weights(stack) if low_bit is not None else set()
    for name, parameter in network.named_parameters():
        weights = _weights(parameter, _is_split(name, plan), low_bit if id(parameter) in packed else None)
        if id(parameter) in owner:
            sizes[owner[id(parameter)]] += weights
        else:
            place = "embedding" if parameter is embedding else "head" if parameter is head else "rest"
            outside[place] += weights
    below = outside["embedding"].trained > 0
    first = next((index for index, block in enumerate(sizes) if below or block.trained > 0), len(sizes))
    return NetworkParts(
        tuple(sizes), **outside, tied=embedding is head, first_trained=first, dividends=_dividends(network, plan)
    )


def _weights(parameter: nn.Parameter, is_split: bool, low_bit: float | None) -> Weights:
    size = parameter.numel() * (parameter.element_size() if low_bit is None or parameter.requires_grad else low_bit)
    trained = parameter.numel() * parameter.requires_grad
    trained_bytes = trained * parameter.element_size()
    split = (size, trained, trained_bytes) if is_split else (0, 0, 0)
    return Weights(size, trained, trained_bytes, *split, trained)


def _linear_weights(stack: nn.ModuleList) -> set[int]:
    return {id(module.weight) for module in stack.modules() if isinstance(module, nn.Linear)}


def _tensor_plan(network: nn.Module) -> dict[str, str]:
    base = unwrapped(network)
    return dict(base.tp_plan or {}) if isinstance(base, PreTrainedModel) else {}


def _is_split(name: str, plan: dict[str, str]) -> bool:
    """Whether a parameter is one that ranks share: a layer of the plan, or an adapter's matrix beside one."""
    layer = name.removeprefix("base_model.model.").rsplit(".", 1)[0]
    layer = layer.removesuffix(".base_layer")
    adapted, _, matrix = layer.partition(".lora_")
    style = next((style for pattern, style in plan.items() if fnmatch.fnmatch(adapted, pattern)), None)
    if style is None:
        return False
    # Of `B A`, the side towards the cut is cut: rows of B where outputs are shared, columns of A where inputs are.
    return not matrix or matrix.startswith("B" if style.startswith("colwise") else "A")


def _dividends(network: nn.Module, plan: dict[str, str]) -> tuple[int, ...]:
    if not plan:
        return ()
    base = unwrapped(network)
    assert isinstance(base, PreTrainedModel)
    text = base.config.get_text_config()
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return tuple(int(size) for name in names if (size := getattr(text, name, None)))
