from __future__ import annotations

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_networks import tiny_gpt2, tiny_llama, tiny_qwen2
from torch import nn

from lightllm.compression.structure import Axis, Sizes, structure_of
from lightllm.models.anatomy import OwnNetwork

KNOWN = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_there_once_with_what_its_dimensions_are(architecture: str, tied: bool) -> None:
    fields = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {} if architecture == "qwen2" else {"head_dim": 6}  # which qwen2 does not declare
    biases = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}
    network = tiny_architecture(architecture, **fields, **biases.get(architecture, {}), tie_word_embeddings=tied)
    structure = structure_of(network)
    head_dim = network.model.layers[0].self_attn.head_dim
    assert structure.sizes == Sizes(layers=2, heads=2, neurons=48, channels=40)
    assert (structure.head_dim, structure.queries_per_head, structure.tied) == (head_dim, 2, tied)
    weights = list(structure.weights())
    found = [id(weight.parameter) for weight in weights]
    assert len(set(found)) == len(found)
    assert set(found) == {id(parameter) for parameter in network.parameters()}
    lengths = {Axis.QUERY: 2 * 2 * head_dim, Axis.KEY: 2 * head_dim, Axis.NEURON: 48, Axis.CHANNEL: 40}
    for weight in weights:
        for axis, size in zip(weight.axes, weight.parameter.shape, strict=True):
            assert size == lengths.get(axis, size)
            assert axis is not Axis.OTHER or size in (97, head_dim)
    assert len(structure.norms) == 5
    assert all(norm.get_parameter("weight").shape == (40,) for norm in structure.norms)


def test_layers_are_numbered() -> None:
    network = tiny_llama()
    layers = {weight.layer for weight in structure_of(network).weights()}
    assert layers == {None, 0, 1}
    for weight in structure_of(network).weights():
        if weight.layer is not None:
            assert any(module is weight.module for module in network.model.layers[weight.layer].modules())


@pytest.mark.parametrize(
    ("architecture", "unknown"),
    [("gemma2", "pre_feedforward_layernorm"), ("olmo2", "post_feedforward_layernorm"), ("phi3", "qkv_proj")],
)
def test_other_architectures_are_refused_by_what_is_unknown(architecture: str, unknown: str) -> None:
    network = tiny_architecture(architecture)
    with pytest.raises(ValueError, match=rf"{type(network).__name__}, of which it does not know what .*{unknown}"):
        structure_of(network)


def test_parts_of_known_names_are_not_enough() -> None:
    # Granite has llama's parameters, and multiplies by numbers of its configuration between them.
    with pytest.raises(ValueError, match="GraniteForCausalLM, of which it does not know how its forward pass"):
        structure_of(tiny_architecture("granite"))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*transformer\.h\.\*\.attn"):
        structure_of(tiny_gpt2())


def test_modules_of_ones_own_and_weights_of_few_bits_are_refused() -> None:
    own = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    with pytest.raises(ValueError, match="needs a transformers network"):
        structure_of(OwnNetwork(own, "1"))
    network = tiny_qwen2()
    packed = torch.zeros(16, dtype=torch.uint8)
    network.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM are stored in few bits.*LoRA instead of QLoRA"):
        structure_of(network)
