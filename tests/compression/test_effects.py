from __future__ import annotations

import pytest
import torch
from tiny_objective import objective, scratch
from torch import nn

from lightllm.compression.effective_lora import EffectiveLoraLinear
from lightllm.compression.effective_weight import EffectiveLinear
from lightllm.compression.effects import effective_layers, inputs_as_they_are, install_effects, mask_layers
from lightllm.compression.fake_quantizer import fake_quantize
from lightllm.compression.schemes import make_scheme
from lightllm.models import LoRA


def test_each_layer_gets_the_class_that_knows_its_weight() -> None:
    network = objective(scratch(), LoRA(rank=2, targets=["q_proj"])).built_network
    layers = mask_layers(network, ["mlp"])
    assert len(layers) == 8
    for name, layer in layers.items():
        assert type(layer) is (EffectiveLoraLinear if name.endswith("q_proj") else EffectiveLinear)
        assert layer.fixed_mask().keep.all()
    assert effective_layers(network) == layers


def test_hooks_stay() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    seen = []
    network[0].register_forward_hook(lambda *_: seen.append(1))
    install_effects(network, ["0"])
    network(torch.ones(2))
    assert seen == [1]


def test_what_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="0 is a Tanh, no linear layer"):
        install_effects(nn.Sequential(nn.Tanh()), ["0"])


def test_rounding_of_inputs_is_left_out_for_a_while() -> None:
    network = objective(scratch()).built_network
    layers = fake_quantize(network, make_scheme("int8_dynamic_int4", 16), [])
    for layer in layers.values():
        assert layer.effect.fake_quantizer is not None
        layer.effect.fake_quantizer.enabled = True
    layer = layers["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, nn.Linear)
    inputs = torch.randn(3, layer.in_features)
    rounded = layer(inputs)
    with inputs_as_they_are(network):
        torch.testing.assert_close(layer(inputs), inputs @ layer.effective_weight().T)
        assert not torch.allclose(layer(inputs), rounded)
    assert torch.equal(layer(inputs), rounded)
