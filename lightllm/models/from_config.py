"""Networks from scratch: a transformers architecture with fields of one's own, or a named size."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.models.document_attention import implementation_for
from lightllm.models.network import Attention, BuildRequest, Dtype, Network, are_weights_to_come, torch_dtype
from lightllm.models.pretrained import AUTO_CLASSES, architecture_for, require_masked_head

_LLAMA = {"model_type": "llama", "rope_theta": 10_000.0, "max_position_embeddings": 2048, "tie_word_embeddings": True}

NAMED_SIZES: dict[str, dict[str, Any]] = {
    "llama-1m": _LLAMA
    | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "num_attention_heads": 4},
    "llama-10m": _LLAMA
    | {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5},
    "llama-30m": _LLAMA
    | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10, "num_attention_heads": 8},
    "llama-124m": _LLAMA
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 17, "num_attention_heads": 12},
    "gpt2": {"model_type": "gpt2"},
    "bert": {"model_type": "bert"},
}
"""Sizes by name; a llama's counts its blocks, the embedding comes on top with the tokenizer's vocabulary."""


class FromConfig(Network):
    """A network from scratch, with random weights.

    The vocabulary size and the special tokens are the tokenizer's, so they are no fields.

    Args:
        architecture: A named size (`llama-1m`, `llama-10m`, `llama-30m`, `llama-124m`, `gpt2`, `bert`) or any
            transformers model type, such as `qwen3` or `modernbert`.
        fields: Fields of that architecture's transformers configuration, such as `num_hidden_layers`; over those
            of a named size.
        dtype: Of the weights.
        attention: The attention implementation, see `Attention`.

    Raises:
        ValueError: No such architecture, or no such field; the message names the nearest. Or a field's value is none.
    """

    def __init__(
        self,
        architecture: str,
        fields: dict[str, Any] | None = None,
        dtype: Dtype = "float32",
        attention: Attention = "by_document",
    ) -> None:
        named = NAMED_SIZES.get(architecture, {"model_type": architecture})
        self.architecture = architecture
        self.model_type: str = named["model_type"]
        self.fields = {key: value for key, value in named.items() if key != "model_type"} | (fields or {})
        self.dtype: Dtype = dtype
        self.attention: Attention = attention
        _check_fields(architecture, self.model_type, self.fields)
        self._configuration(self.fields)

    @property
    @override
    def tokenizer_source(self) -> str | None:
        return None

    @property
    @override
    def restorable(self) -> bool:
        return False

    @override
    def build(self, request: BuildRequest) -> nn.Module:
        if request.quantization is not None:
            raise ValueError("a network from scratch has nothing to quantize yet: take QLoRA with Pretrained")
        config = self.configuration(request.tokenizer)
        architecture = architecture_for(config, request.task)
        require_masked_head(self.architecture, architecture, request.task)
        attention = implementation_for(self.attention, architecture)
        with torch.device("meta") if are_weights_to_come() else nullcontext():
            network = AUTO_CLASSES[request.task].from_config(  # type: ignore[attr-defined]
                config, dtype=torch_dtype(self.dtype), attn_implementation=attention
            )
        assert isinstance(network, nn.Module)
        return network

    def configuration(self, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
        """The transformers configuration, with the vocabulary and the special tokens of `tokenizer`.

        Raises:
            ValueError: There is no tokenizer and `fields` has no `vocab_size`.
        """
        fields = dict(self.fields)
        if tokenizer is not None:
            fields.setdefault("vocab_size", len(tokenizer))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                fields.setdefault(name, getattr(tokenizer, name))
        elif "vocab_size" not in fields:
            raise ValueError(
                f"the network {self.architecture!r} takes its vocabulary from the data's tokenizer, and there is none: "
                "give the datamodule a tokenizer, or `fields: {vocab_size: …}`"
            )
        return self._configuration(fields)

    def _configuration(self, fields: dict[str, Any]) -> PretrainedConfig:
        try:
            return CONFIG_MAPPING[self.model_type](**fields)
        except Exception as error:  # what transformers checks with has errors of its own, which are no ValueError
            raise ValueError(f"the fields of {self.architecture!r} make no network: {error}") from error


def _check_fields(architecture: str, model_type: str, fields: dict[str, Any]) -> None:
    """Refuse what transformers would keep without a word: an unknown field, and the typing error with it."""
    if model_type not in CONFIG_MAPPING:
        near = get_close_matches(architecture, [*NAMED_SIZES, *CONFIG_MAPPING], n=3, cutoff=0.5)
        raise ValueError(
            f"no architecture {architecture!r}: give a named size ({', '.join(NAMED_SIZES)}) or a transformers model "
            f"type{f' (did you mean {near[0]!r}?)' if near else ''}"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = {
        *inspect.signature(config_class.__init__).parameters,
        *inspect.signature(PretrainedConfig.__init__).parameters,
        *config_class.attribute_map,
    } - {"self", "kwargs"}
    for name in fields:
        if name not in known | {"rope_theta"}:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            raise ValueError(f"{architecture!r} has no field {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}")
