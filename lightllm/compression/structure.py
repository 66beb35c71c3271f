"""Where a llama-like network keeps what can be taken out of it: heads, neurons, hidden channels, layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightllm.models.anatomy import blocks, decoder, input_embedding, transformers_network

_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Networks of transformers whose forward pass is known here: what each weight multiplies, and nothing else."""

_PARAMETERS = re.compile(
    r"(model\.embed_tokens|model\.norm|lm_head)\.weight|model\.layers\.\d+\.("
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.(weight|bias)"
    r"|self_attn\.[qk]_norm\.weight|(input|post_attention)_layernorm\.weight)"
)


class Axis(Enum):
    """What the rows or columns of a weight stand for."""

    QUERY = "the query heads that read one key/value head, after one another"
    KEY = "key/value heads"
    NEURON = "neurons of the MLP"
    CHANNEL = "channels of the residual stream"
    OTHER = "what is never removed"


_BLOCK: dict[str, tuple[Axis, Axis]] = {
    "self_attn.q_proj": (Axis.QUERY, Axis.CHANNEL),
    "self_attn.k_proj": (Axis.KEY, Axis.CHANNEL),
    "self_attn.v_proj": (Axis.KEY, Axis.CHANNEL),
    "self_attn.o_proj": (Axis.CHANNEL, Axis.QUERY),
    "mlp.gate_proj": (Axis.NEURON, Axis.CHANNEL),
    "mlp.up_proj": (Axis.NEURON, Axis.CHANNEL),
    "mlp.down_proj": (Axis.CHANNEL, Axis.NEURON),
}
"""Rows and columns of each linear layer of a block; a bias has the rows."""


class Weight(NamedTuple):
    """One parameter, with what its dimensions stand for."""

    module: nn.Module
    name: str
    layer: int | None
    """The block that it is in, counted from 0; None outside."""
    axes: tuple[Axis, ...]

    @property
    def parameter(self) -> nn.Parameter:
        """It as it is now."""
        return self.module.get_parameter(self.name)


class Sizes(NamedTuple):
    """How many of each a network has; in every layer as many, because its configuration has one number for all."""

    layers: int
    heads: int
    """Key/value heads, each with the query heads that read it."""
    neurons: int
    channels: int
    """Width of the residual stream."""


class Structure(NamedTuple):
    """A network that pruning can take apart."""

    network: PreTrainedModel
    layers: nn.ModuleList
    embedding: nn.Embedding
    final_norm: nn.Module
    head: nn.Linear

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the network itself, not a copy."""
        return self.network.config

    @property
    def sizes(self) -> Sizes:
        """How many of each there are now."""
        config = self.config
        return Sizes(
            len(self.layers), config.num_key_value_heads, config.intermediate_size, self.embedding.embedding_dim
        )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        width: int = self.layers[0].self_attn.head_dim  # type: ignore[assignment, union-attr]
        return width

    @property
    def queries_per_head(self) -> int:
        """Query heads that read one key/value head."""
        queries: int = self.config.num_attention_heads
        return queries // self.sizes.heads

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's own."""
        return self.head.weight is self.embedding.weight

    @property
    def norms(self) -> list[nn.Module]:
        """The norms of the residual stream in the order of computation: two a layer, and the final one."""
        names = "input_layernorm", "post_attention_layernorm"
        return [layer.get_submodule(name) for layer in self.layers for name in names] + [self.final_norm]

    def width(self, axis: Axis) -> int:
        """Rows (or columns) that one unit takes on an axis."""
        return {Axis.QUERY: self.queries_per_head * self.head_dim, Axis.KEY: self.head_dim}.get(axis, 1)

    def weights(self) -> Iterator[Weight]:
        """Every parameter once, in the order of computation; a tied head is the embedding."""
        yield Weight(self.embedding, "weight", None, (Axis.OTHER, Axis.CHANNEL))
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                place, _, kind = name.rpartition(".")
                axes: tuple[Axis, ...] = (Axis.CHANNEL,)  # of a norm
                if place in _BLOCK:
                    axes = _BLOCK[place] if parameter.ndim == 2 else _BLOCK[place][:1]
                elif place.startswith("self_attn."):  # a norm within a head
                    axes = (Axis.OTHER,)
                yield Weight(layer.get_submodule(place), kind, index, axes)
        yield Weight(self.final_norm, "weight", None, (Axis.CHANNEL,))
        if not self.tied:
            yield Weight(self.head, "weight", None, (Axis.OTHER, Axis.CHANNEL))


def structure_of(network: nn.Module) -> Structure:
    """Find the parts of a network.

    Raises:
        ValueError: The architecture is none whose computation is known, or its weights are stored in few bits; the
            message names the architecture and what of it is unknown.
    """
    base = transformers_network(network)
    _check_architecture(base)
    head = base.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return Structure(base, blocks(base), input_embedding(base), decoder(base).get_submodule("norm"), head)


def _check_architecture(base: PreTrainedModel) -> None:
    name = type(base).__name__
    parameters = dict(base.named_parameters())
    unknown = sorted({re.sub(r"\.\d+\.", ".*.", one) for one in parameters if not _PARAMETERS.fullmatch(one)})
    if name in _CLASSES and not unknown:
        _check_dtype(name, list(parameters.values()))
        return
    reason = f"what {', '.join(unknown[:4])} do" if unknown else "how its forward pass joins its weights"
    raise ValueError(
        f"structured pruning knows {', '.join(_CLASSES)}, and this is {name}, of which it does not know {reason}: "
        "take one of those, or set weights to zero by WandaPruning or MagnitudePruning, which leaves every shape"
    )


def _check_dtype(name: str, parameters: list[nn.Parameter]) -> None:
    if not all(parameter.is_floating_point() for parameter in parameters):
        raise ValueError(
            f"the weights of this {name} are stored in few bits, out of which no part can be cut: prune it in float32 "
            "or bfloat16 (LoRA instead of QLoRA), and quantize what comes of it"
        )
