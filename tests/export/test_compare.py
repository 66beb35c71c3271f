from pathlib import Path

import pytest
import torch
from tiny_networks import tiny_llama, token_rows
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaForCausalLM

from lightllm.compression.fake_quantizer import fake_quantize
from lightllm.compression.schemes import make_scheme
from lightllm.export.compare import TOLERANCE, difference, outputs, verify
from lightllm.export.merge import merged_network


def test_a_folder_of_the_same_weights_passes_and_another_fails(tmp_path: Path) -> None:
    network = tiny_llama().train()
    network.save_pretrained(tmp_path)
    assert verify(tmp_path, network, torch.float32) == (0.0, 0.0)
    assert network.training
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match="it would not be what was trained"):
        verify(tmp_path, network, torch.float32)
    assert 1e-4 < verify(tmp_path, network, torch.bfloat16).relative < 0.1
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="differ"):
        verify(tmp_path, network, torch.bfloat16)


def test_a_difference_is_one_of_rounding_as_far_as_rounding_moves_the_network(tmp_path: Path) -> None:
    sensitive = tiny_llama()
    with torch.no_grad():
        for parameter in sensitive.parameters():
            parameter *= 3
    sensitive.save_pretrained(tmp_path)
    found = verify(tmp_path, sensitive, torch.bfloat16)
    assert found.relative > TOLERANCE[torch.bfloat16]
    with torch.no_grad():
        sensitive.model.layers[0].self_attn.q_proj.weight *= -1
    with pytest.raises(ValueError, match=r"rounding in torch\.float32 explains"):
        verify(tmp_path, sensitive, torch.float32)


def test_a_network_that_rounds_its_inputs_is_compared_as_plain_transformers_computes(tmp_path: Path) -> None:
    network = tiny_llama()
    for layer in fake_quantize(network, make_scheme("int8_dynamic_int4", 16), []).values():
        assert layer.effect.fake_quantizer is not None
        layer.effect.fake_quantizer.enabled = True
    merged_network(network).save_pretrained(tmp_path)
    assert verify(tmp_path, network, torch.float32).relative < 1e-5
    exported = LlamaForCausalLM.from_pretrained(tmp_path)
    assert difference(network, exported).relative > 1e-3, "inputs are rounded again"


def test_the_difference_is_the_largest_of_all_logits() -> None:
    network, other = tiny_llama(), tiny_llama()
    other.load_state_dict(network.state_dict())
    assert difference(network, other) == (0.0, 0.0)
    with torch.no_grad():
        other.model.norm.weight *= 1.5
    found = difference(network, other)
    assert found.relative == pytest.approx(0.5, rel=1e-5)
    assert found.absolute > found.relative


def test_networks_without_logits_are_compared_by_hidden_states() -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    rows = token_rows(50)
    assert outputs(BertModel(config), rows).shape == (*rows.shape, 32)
    assert outputs(BertForMaskedLM(config), rows).shape == (*rows.shape, 50)


def test_outputs_are_float32_outside_of_autocast() -> None:
    network = tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = outputs(network, token_rows())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outputs(network, token_rows()))
