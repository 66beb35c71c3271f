"""Networks without weights have the parameters of those with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_networks import Transformer
from tiny_checkpoint import saved
from torch import nn

from lightllm.models import BuildRequest, EveryNthLayer, FromConfig, FromModule, Pretrained
from lightllm.models.empty_network import empty_network

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def shapes(network: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (parameter.shape, parameter.dtype) for name, parameter in network.named_parameters()}


def test_from_a_configuration() -> None:
    network = FromConfig("llama", {**SMALL, "vocab_size": 50}, dtype="bfloat16")
    empty = empty_network(network, "causal")
    assert shapes(empty) == shapes(network.build(BuildRequest("causal", None)))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_datas_vocabulary_counts_unless_the_configuration_has_its_own() -> None:
    assert empty_network(FromConfig("llama", SMALL), "causal", 70).get_input_embeddings().num_embeddings == 70  # type: ignore[operator]
    own = FromConfig("llama", {**SMALL, "vocab_size": 50})
    assert empty_network(own, "causal", 70).get_input_embeddings().num_embeddings == 50  # type: ignore[operator]
    with pytest.raises(ValueError, match="takes its vocabulary from the data's tokenizer"):
        empty_network(FromConfig("llama", SMALL), "causal")


def test_an_architecture_whose_own_padding_is_beyond_the_datas_vocabulary() -> None:
    network = FromConfig("modernbert", {**SMALL})
    assert empty_network(network, "masked", 70).get_input_embeddings().num_embeddings == 70  # type: ignore[operator]


def test_pretrained_and_some_layers_of_it(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for network in (Pretrained(folder), Pretrained(folder, dtype="bfloat16"), EveryNthLayer(folder, step=2)):
        assert shapes(empty_network(network, "causal")) == shapes(network.build(BuildRequest("causal", None)))


def test_a_module_of_ones_own() -> None:
    empty = empty_network(FromModule(Transformer), "causal", 50)
    assert empty.module.lm_head.weight.shape == (50, 16)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="there is none"):
        empty_network(FromModule(Transformer), "causal")
