from __future__ import annotations

import pytest
import torch
from tiny_objective import objective, scratch
from torch import nn

from lightllm.compression.effective_lora import EffectiveLoraLinear, as_effective_lora
from lightllm.compression.effects import mask_layers
from lightllm.compression.fake_quantizer import GridFakeQuantizer, fake_quantize
from lightllm.compression.schemes import make_scheme
from lightllm.models import LoRA, RsLoRA
from lightllm.models.anatomy import adapter_switched_off, unwrapped
from lightllm.models.lora_linear import LoraLinear

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("adapter", [LoRA(rank=2, alpha=6), RsLoRA(rank=4, alpha=6)])
def test_the_scale_is_the_adapters_own(adapter: LoRA | RsLoRA) -> None:
    network = objective(scratch(), adapter).built_network
    layer = mask_layers(network, [])[NAME]
    assert isinstance(layer, EffectiveLoraLinear)
    nn.init.normal_(layer.lora_B["default"].weight)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.merged_weight(), layer.base.weight + 3 * update)


def test_switched_off_it_is_the_weight_alone_under_its_mask() -> None:
    network = objective(scratch(), LoRA(rank=2)).built_network
    layer = mask_layers(network, [])[NAME]
    assert isinstance(layer, EffectiveLoraLinear)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.set_keep(torch.rand_like(layer.base.weight) < 0.5)
    inputs = torch.randn(3, 32)
    with adapter_switched_off(network):
        torch.testing.assert_close(layer(inputs), inputs @ (layer.base.weight * layer.fixed_mask().keep).T)
    assert not torch.equal(layer.merged_weight(), layer.base.weight)


def test_other_layers_of_peft_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    network = get_peft_model(nn.ModuleDict({"inner": nn.Embedding(4, 4)}), LoraConfig(r=2, target_modules=["inner"]))
    with pytest.raises(ValueError, match=r"inner is peft's Embedding, whose merged weight"):
        as_effective_lora("inner", network.get_base_model()["inner"])


def test_with_neither_mask_nor_rounding_it_is_the_adapters_own_product() -> None:
    network = objective(scratch(), LoRA(rank=2)).built_network
    layer = unwrapped(network).get_submodule(NAME)
    assert isinstance(layer, LoraLinear)
    nn.init.normal_(layer.lora_B["default"].weight)
    inputs = torch.randn(3, 32)
    before = layer(inputs)
    fake_quantize(network, make_scheme("int4_weight_only", 16), [])
    assert isinstance(layer, EffectiveLoraLinear)
    assert torch.equal(layer(inputs), before)


@pytest.mark.parametrize("base_trains", [False, True])
@pytest.mark.parametrize("frozen_scales", [False, True])
def test_rounded_it_learns_as_its_merged_weight_would(base_trains: bool, frozen_scales: bool) -> None:
    """Against autograd through the merged weight and the quantizer."""
    network = objective(scratch(), LoRA(rank=2)).built_network
    layer = fake_quantize(network, make_scheme("int4_weight_only", 16), [])[NAME]
    assert isinstance(layer, EffectiveLoraLinear)
    quantizer = layer.effect.fake_quantizer
    assert isinstance(quantizer, GridFakeQuantizer)
    quantizer.enabled = True
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    nn.init.normal_(up)
    if frozen_scales:
        quantizer.freeze_scales(layer.merged_weight() / 2)
    layer.base.weight.requires_grad_(base_trains)
    inputs = torch.randn(3, 32, requires_grad=True)
    leaves = [inputs, up, down, *([layer.base.weight] if base_trains else [])]
    merged = layer.base.weight + layer.scaling["default"] * up @ down
    expected = inputs @ quantizer.weight(merged).T
    expected_gradients = torch.autograd.grad(expected.sin().sum(), leaves)
    found = layer(inputs)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.sin().sum(), leaves), expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_products_are_of_its_dtype(masked: bool) -> None:
    network = objective(scratch(), LoRA(rank=2)).built_network
    layer = fake_quantize(network, make_scheme("int8_dynamic_int4", 16), [])[NAME]
    assert isinstance(layer, EffectiveLoraLinear)
    assert layer.effect.fake_quantizer is not None
    layer.effect.fake_quantizer.enabled = True
    if masked:
        mask_layers(network, [])
    nn.init.normal_(layer.lora_B["default"].weight)
    inputs = torch.randn(3, 32)
    expected = layer(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(inputs)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 2e-2 * expected.abs().max()
    found.sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
