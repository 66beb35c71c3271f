import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_networks import tiny_llama, tiny_qwen2, token_rows
from torch import nn

from lightllm.compression.factored_linear import factored, replace_layers
from lightllm.compression.low_rank import spectrum


@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_the_product_of_its_factors(bias: bool) -> None:
    layer = nn.Linear(6, 9, bias=bias)
    thin = factored(layer, 3, spectrum(layer.weight).factors(3))
    x = torch.randn(2, 4, 6)
    weight = thin.up.weight @ thin.down.weight
    torch.testing.assert_close(thin(x), nn.functional.linear(x, weight, layer.bias))
    assert torch.linalg.matrix_rank(weight) == 3
    assert sum(parameter.numel() for parameter in thin.parameters()) == 3 * (6 + 9) + 9 * bias
    assert thin.up.bias is layer.bias
    assert (thin.in_features, thin.out_features, thin.rank) == (6, 9, 3)


def test_at_full_rank_it_is_the_layer() -> None:
    layer = nn.Linear(6, 4)
    thin = factored(layer, 4, spectrum(layer.weight).factors(4))
    x = torch.randn(3, 6)
    torch.testing.assert_close(thin(x), layer(x), atol=1e-5, rtol=1e-5)


def test_it_is_where_and_what_the_layer_was() -> None:
    layer = nn.Linear(6, 4, dtype=torch.bfloat16).requires_grad_(False).eval()
    before = torch.random.get_rng_state()
    thin = factored(layer, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert {parameter.dtype for parameter in thin.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in thin.parameters())
    assert not thin.training
    assert not thin.down.weight.any()
    assert factored(nn.Linear(6, 4, device="meta"), 2).up.weight.is_meta
    free = factored(nn.Linear(6, 4), 2)
    assert all(parameter.requires_grad for parameter in free.parameters())
    assert free.training


def test_an_adapter_of_all_linear_layers_finds_both_factors() -> None:
    network = tiny_qwen2()
    name = "model.layers.0.self_attn.q_proj"
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    replace_layers(network, {name: factored(layer, 4, spectrum(layer.weight).factors(4))})
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {f"base_model.model.{name}.{part}.lora_A.default.weight" for part in ("down", "up")} <= trained
    assert not any(f"{name}.lora" in key for key in trained)
    assert adapted(input_ids=token_rows()).logits.isfinite().all()


def test_layers_of_an_adapted_network_are_replaced_by_their_plain_names() -> None:
    network = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    thin = factored(nn.Linear(32, 48), 2)
    replace_layers(network, {"model.layers.1.mlp.up_proj": thin})
    assert network.get_base_model().model.layers[1].mlp.up_proj is thin
