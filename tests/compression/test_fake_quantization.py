from __future__ import annotations

import pytest
import torch
from tiny_objective import objective, scratch

from lightllm.compression.effects import effective_layers
from lightllm.compression.fake_quantization import FakeQuantization
from lightllm.compression.schemes import make_scheme
from lightllm.models import LoRA


@pytest.mark.parametrize("train_base", [False, True])
def test_quantizers_are_installed_switched_off_and_the_base_trains_if_asked(train_base: bool) -> None:
    network = objective(scratch(), LoRA(rank=2)).built_network
    step = FakeQuantization("step", make_scheme("int4_weight_only", 16), ["q_proj"], train_base)
    assert step.apply(network, None) is None
    assert [layer for layer, _ in step.layers] == list(effective_layers(network).values())
    assert not any(quantizer.enabled for _, quantizer in step.layers)
    assert all(layer.effect.fake_quantizer is quantizer for layer, quantizer in step.layers)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    base = {name for name in trained if "base_layer" in name}
    assert {name.split(".")[-3] for name in base} == (
        {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} if train_base else set()
    )


def test_a_base_that_trains_anyway_is_not_asked_for() -> None:
    step = FakeQuantization("step", make_scheme("int4_weight_only", 16), [], train_base=True)
    with pytest.raises(ValueError, match="train_base trains weights beside LoRA, and there is no adapter"):
        step.apply(objective(scratch()).built_network, None)


def test_another_network_has_layers_of_its_own() -> None:
    step = FakeQuantization("step", make_scheme("int4_weight_only", 16), [], train_base=False)
    for _ in range(2):
        network = objective(scratch()).built_network
        step.apply(network, None)
        assert [layer for layer, _ in step.layers] == list(effective_layers(network).values())
    assert torch.isfinite(step.layers[0][0].effective_weight()).all()
