from __future__ import annotations

import pytest
import torch
from tiny_objective import objective, scratch
from torch import nn

from lightllm.compression.effective_lora import EffectiveLoraLinear
from lightllm.compression.effective_weight import EffectiveLinear
from lightllm.compression.effects import effective_layers, install_effects, mask_layers
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
