"""Where parameters lie, against a count by hand."""

from __future__ import annotations

import pytest
from own_networks import Transformer
from tiny_networks import tiny_gpt2, tiny_llama

from lightllm.models import Frozen, LoRA
from lightllm.models.anatomy import OwnNetwork
from lightllm.parallel.network_parts import Weights, network_parts

VOCAB, WIDTH, INNER = 320, 32, 48


def test_a_llamas_parts() -> None:
    parts = network_parts(tiny_llama(tied=False))
    matrices = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER
    assert [block.bytes for block in parts.blocks] == [4 * (matrices + 2 * WIDTH)] * 2
    assert [block.split_bytes for block in parts.blocks] == [4 * matrices] * 2
    assert parts.embedding.bytes == parts.head.bytes == 4 * VOCAB * WIDTH
    assert parts.rest.bytes == 4 * WIDTH
    assert parts.total.trained == sum(parameter.numel() for parameter in tiny_llama(tied=False).parameters())
    assert parts.dividends == (4, 2, INNER)
    assert not parts.tied


def test_a_tied_head_is_the_embedding() -> None:
    parts = network_parts(tiny_llama())
    assert parts.tied
    assert parts.head == Weights()


def test_a_network_without_a_tensor_plan_is_not_split() -> None:
    parts = network_parts(tiny_gpt2())
    assert parts.dividends == ()
    assert parts.total.split_bytes == 0


def test_of_an_adapter_the_side_towards_the_cut_is_split() -> None:
    parts = network_parts(LoRA(rank=2, targets=["q_proj", "o_proj"]).attach(tiny_llama()))
    block = parts.blocks[0]
    assert block.trained == 2 * (2 * WIDTH + 2 * WIDTH)
    assert block.split_trained == 2 * WIDTH + 2 * WIDTH  # B of q_proj, A of o_proj
    assert block.on_a_rank(2).trained == 1.5 * 2 * 2 * WIDTH
    assert parts.embedding.trained == 0
    assert parts.first_trained == 0


def test_gradients_reach_down_to_the_first_block_that_trains() -> None:
    assert network_parts(Frozen(num_blocks=1).attach(tiny_llama())).first_trained == 1
    assert network_parts(Frozen(num_blocks=1, embedding=False).attach(tiny_llama())).first_trained == 0


def test_frozen_weights_of_few_bits_are_counted_as_stored() -> None:
    network = LoRA(rank=2).attach(tiny_llama(tied=False).bfloat16())
    whole, packed = network_parts(network), network_parts(network, low_bit=0.5)
    matrices = whole.blocks[0].bytes - whole.blocks[0].trained_bytes - 2 * 2 * WIDTH
    assert whole.blocks[0].bytes - packed.blocks[0].bytes == pytest.approx(matrices * 0.75)
    assert whole.embedding == packed.embedding


def test_a_module_of_ones_own() -> None:
    network = OwnNetwork(Transformer(50), "lm_head")
    parts = network_parts(network)
    assert parts.total.trained == sum(parameter.numel() for parameter in network.parameters())
