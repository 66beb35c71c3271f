from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_networks import token_rows
from tiny_objective import cut, documents, objective, scratch
from torch import Tensor, nn

from lightllm.compression.effective_weight import EffectiveLinear, FakeQuantizer, FixedMask, zero_outside
from lightllm.compression.effects import effective_layers, install_effects, mask_layers
from lightllm.compression.layers import prunable_layers
from lightllm.export.merge import merged_network
from lightllm.models import DoRA, LoRA
from lightllm.models.hidden_states import hidden_states

NAME = "model.layers.1.mlp.down_proj"


class Eighths(FakeQuantizer):
    """Rounds weights to eighths, and inputs to sixteenths."""

    def weight(self, weight: Tensor) -> Tensor:
        return weight + ((weight * 8).round() / 8 - weight).detach()

    def inputs(self, inputs: Tensor) -> Tensor:
        return inputs + ((inputs * 16).round() / 16 - inputs).detach()


class EighthsOfWeights(Eighths):
    """Leaves inputs as they are, as a plain network does."""

    def inputs(self, inputs: Tensor) -> Tensor:
        return inputs


def random_keep(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5


def trained(adapter: Any = None) -> nn.Module:
    """A network, adapted by matrices that are not zero."""
    network = objective(scratch(), adapter).built_network
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    return network


def test_installing_changes_neither_numbers_nor_names() -> None:
    for adapter in (None, LoRA(rank=2)):
        network, plain = trained(adapter), trained(adapter)
        batch = cut(documents(), [12], packed=True)[0]
        layers = mask_layers(network, [])
        assert set(layers) == set(effective_layers(network)) == set(prunable_layers(plain))
        assert [name for name, _ in network.named_parameters()] == [name for name, _ in plain.named_parameters()]
        torch.testing.assert_close(hidden_states(network, batch), hidden_states(plain, batch), rtol=1e-5, atol=1e-5)
        assert mask_layers(network, []) == layers, "installed once"


def test_a_mask_is_held_by_a_plain_weight() -> None:
    layer = nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    network = nn.Sequential(layer)
    effective = install_effects(network, ["0"])["0"]
    assert isinstance(effective, EffectiveLinear)
    effective.effect.masking = FixedMask(layer.weight.shape, layer.weight.device)
    keep = random_keep(before)
    effective.set_keep(keep)
    inputs = torch.randn(3, 6)
    torch.testing.assert_close(network(inputs), inputs @ (before * keep).T + layer.bias)
    network(inputs).sum().backward()
    assert layer.weight.grad is not None
    effective.hold_gradient()
    torch.testing.assert_close(layer.weight.grad, inputs.sum(0).expand(4, 6) * keep)
    assert torch.equal(effective.effective_weight(), before * keep)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_low_rank_update_is_masked_and_rounded_with_its_weight(quantized: bool) -> None:
    """The layer's output and the gradients of both thin matrices, against autograd of the formula."""
    network = trained(LoRA(rank=3, alpha=6))
    effective = install_effects(network, [NAME])[NAME]
    assert isinstance(effective, nn.Module)
    weight, a, b = (
        effective.get_parameter(name).detach().clone().requires_grad_()
        for name in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    keep = random_keep(weight)
    effective.effect.masking = FixedMask(weight.shape, weight.device)
    effective.set_keep(keep)
    if quantized:
        effective.effect.fake_quantizer = Eighths()
    inputs = torch.randn(2, 5, weight.shape[1])
    merged = keep * (weight + 2 * (b @ a))
    if quantized:
        merged = merged + ((merged * 8).round() / 8 - merged).detach()
    expected = (inputs * 16).round() / 16 @ merged.T if quantized else inputs @ merged.T
    found = effective(inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(effective.effective_weight(), merged.detach())
    for one in (found, expected):
        one.square().sum().backward()
    torch.testing.assert_close(effective.get_parameter("lora_A.default.weight").grad, a.grad)
    torch.testing.assert_close(effective.get_parameter("lora_B.default.weight").grad, b.grad)


def test_written_weights_leave_the_adapter_as_it_is() -> None:
    network = trained(LoRA(rank=3))
    effective = mask_layers(network, [])[NAME]
    assert isinstance(effective, nn.Module)
    update = effective.get_parameter("lora_B.default.weight").clone()
    wanted = torch.randn_like(effective.merged_weight())
    effective.write_merged(wanted)
    torch.testing.assert_close(effective.merged_weight(), wanted)
    assert torch.equal(effective.get_parameter("lora_B.default.weight"), update)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_a_checkpoint_brings_the_mask_back_and_a_frozen_weight_under_it(adapter: Any) -> None:
    network, again = trained(adapter), trained(adapter)
    layers = mask_layers(network, [])
    for layer in layers.values():
        layer.set_keep(random_keep(layer.base.weight))
    state = network.state_dict()
    masks = [value for name, value in state.items() if "effect" in name]
    assert sum(value.numel() for value in masks) == sum(layer.base.weight.numel() for layer in layers.values()) // 8
    mask_layers(again, [])
    again.load_state_dict(
        {name: value for name, value in state.items() if "effect" in name or "lora" in name}, strict=False
    )
    for name, layer in effective_layers(again).items():
        assert torch.equal(layer.effective_weight(), layers[name].effective_weight())
        assert torch.equal(layer.fixed_mask().keep, layers[name].fixed_mask().keep)
    batch = cut(documents(), [12], packed=True)[0]
    assert torch.equal(hidden_states(again, batch), hidden_states(network, batch))


def test_masks_of_any_size_are_packed() -> None:
    for shape in ((3, 5), (1, 8), (2, 12)):
        mask, other = (FixedMask(torch.Size(shape), torch.device("cpu")) for _ in range(2))
        mask.keep.copy_(random_keep(mask.keep))
        state = mask.state_dict()
        assert [value.dtype for value in state.values()] == [torch.uint8]
        other.load_state_dict(state)
        assert torch.equal(other.keep, mask.keep)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_merged_is_what_trained(adapter: Any, quantized: bool) -> None:
    network = trained(adapter).eval()
    for layer in mask_layers(network, []).values():
        layer.set_keep(random_keep(layer.base.weight))
        if quantized:
            layer.effect.fake_quantizer = EighthsOfWeights()
    merged = merged_network(network)
    again = type(merged)(merged.config)
    again.load_state_dict(merged.state_dict())
    tokens = token_rows(40, rows=2, length=8)
    with torch.no_grad():
        ours, theirs = network(input_ids=tokens).logits, again.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weight = merged.get_parameter(f"{NAME}.weight")
    assert (weight == 0).float().mean() > 0.4
    if quantized:
        assert torch.equal(weight * 8, (weight * 8).round())


def test_a_disabled_quantizer_rounds_nothing() -> None:
    layer = nn.Linear(6, 4)
    expected = layer(torch.ones(6))
    effective = install_effects(nn.Sequential(layer), ["0"])["0"]
    effective.effect.fake_quantizer = quantizer = Eighths()
    quantizer.enabled = False
    assert torch.equal(layer(torch.ones(6)), expected)
    quantizer.enabled = True
    assert not torch.equal(layer(torch.ones(6)), expected)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (DoRA(rank=2), r"variant of LoRA \(DoRA\): take LoRA"),
        (LoRA(rank=2, dropout=0.1), "drops inputs of its own update, which a merged weight cannot"),
    ],
)
def test_adapters_without_a_merged_weight_are_refused(adapter: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_layers(trained(adapter), [])


def test_a_fixed_mask_is_asked_for_where_there_is_none() -> None:
    effective = install_effects(nn.Sequential(nn.Linear(2, 2)), ["0"])["0"]
    with pytest.raises(ValueError, match="no fixed mask"):
        effective.set_keep(torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_outside_of_a_mask_is_zeroed_and_nothing_else_touched(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(7, 9).to(dtype))
    keep = torch.rand(7, 9) > 0.5
    expected = torch.where(keep, weight.detach(), torch.zeros((), dtype=dtype))
    with torch.no_grad():
        zero_outside(weight, keep)
    assert torch.equal(weight, expected)
