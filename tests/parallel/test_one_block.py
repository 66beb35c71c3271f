"""A network of one block has the parts of the whole."""

from __future__ import annotations

import pytest
from own_networks import Gru
from tiny_networks import tiny_llama

from lightllm.models import FromModule, Frozen, Full, LoRA
from lightllm.models.anatomy import blocks, output_head
from lightllm.models.empty_network import empty_network
from lightllm.parallel.one_block import one_block, thin_config


def test_its_block_has_the_parameters_of_the_first() -> None:
    whole = tiny_llama()
    single = one_block(whole, Full())()
    assert len(blocks(single)) == 1
    shapes = {name: parameter.shape for name, parameter in blocks(whole)[0].named_parameters()}
    assert {name: parameter.shape for name, parameter in blocks(single)[0].named_parameters()} == shapes
    assert output_head(single).weight.is_meta
    assert whole.config.num_hidden_layers == 2


def test_a_rank_of_a_tensor_group_has_fewer_heads_and_neurons_as_wide_as_before() -> None:
    config = thin_config(tiny_llama().config, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 24)
    assert config.head_dim == 8
    assert config.hidden_size == 32


def test_an_adapter_is_attached_and_freezing_left_to_the_whole_network() -> None:
    trained = [name for name, one in one_block(tiny_llama(), LoRA(rank=2))().named_parameters() if one.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    assert all(one.requires_grad for one in one_block(tiny_llama(), Frozen(num_blocks=2))().parameters())


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads 2 does not divide by a tensor degree of 4"):
        thin_config(tiny_llama().config, 4)


def test_a_module_of_ones_own() -> None:
    whole = empty_network(FromModule(Gru, head="out"), "causal", 50)
    assert len(blocks(one_block(whole, Full())())) == 1
    assert len(blocks(whole)) == 2
