from __future__ import annotations

import pytest
import torch
from own_networks import Transformer
from tiny_networks import tiny_llama, tiny_tokenizer
from tiny_objective import objective, scratch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightllm.compression.layers import linear_layer, prunable_layers
from lightllm.models import BuildRequest, FromModule, LoRA
from lightllm.models.lora_linear import LoraLinear

NAMES = [
    f"model.layers.{block}.{layer}"
    for block in range(2)
    for layer in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def test_the_linear_layers_of_the_blocks_and_no_head() -> None:
    assert list(prunable_layers(tiny_llama(tied=False))) == NAMES


def test_adapted_layers_have_the_names_of_the_plain_network() -> None:
    found = prunable_layers(objective(scratch(), LoRA(rank=2, targets=["q_proj"])).built_network)
    assert list(found) == NAMES
    assert [name for name, layer in found.items() if isinstance(layer, LoraLinear)] == [NAMES[0], NAMES[7]]
    assert linear_layer(NAMES[0], found[NAMES[0]]).weight.shape == (32, 32)


def test_layers_are_left_out_by_expression() -> None:
    found = prunable_layers(tiny_llama(), [r"layers\.0\.", "mlp"])
    assert list(found) == NAMES[7:11]
    with pytest.raises(ValueError, match=r"no layer's name matches 'mpl', so nothing is left out by it; 'model.lay"):
        prunable_layers(tiny_llama(), ["mpl"])
    with pytest.raises(ValueError, match="leaves no layer to compress"):
        prunable_layers(tiny_llama(), ["layers"])


def test_a_module_of_ones_own_has_them_too() -> None:
    network = FromModule(Transformer).build(BuildRequest("causal", tiny_tokenizer()))
    found = prunable_layers(network)
    assert found
    assert all(isinstance(layer, nn.Linear) for layer in found.values())


def test_layers_without_a_plain_weight_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no nn.Linear in its blocks"):
        prunable_layers(gpt2)
    from bitsandbytes.nn import Linear4bit

    with pytest.raises(ValueError, match="the weight of q_proj is stored in few bits"):
        linear_layer("q_proj", Linear4bit(64, 64, quant_type="nf4"))
    with pytest.raises(ValueError, match="norm is a LayerNorm, no linear layer"):
        linear_layer("norm", nn.LayerNorm(4))
    assert torch.is_tensor(linear_layer("x", nn.Linear(2, 2)).weight)
