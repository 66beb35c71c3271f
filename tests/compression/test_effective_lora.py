from __future__ import annotations

import pytest
import torch
from tiny_objective import objective, scratch
from torch import nn

from lightllm.compression.effective_lora import EffectiveLoraLinear, as_effective_lora
from lightllm.compression.effects import mask_layers
from lightllm.models import LoRA, RsLoRA
from lightllm.models.anatomy import adapter_switched_off

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
