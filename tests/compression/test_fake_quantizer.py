from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_quantized import switch_on
from tiny_architectures import tiny_architecture
from tiny_networks import token_rows
from tiny_objective import objective, scratch
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import QATConfig
from transformers import PreTrainedModel

from lightllm.compression.effective_weight import FixedMask
from lightllm.compression.effects import effective_layers
from lightllm.compression.fake_quantizer import GridFakeQuantizer, SharedInputs, fake_quantize, to_low_bits
from lightllm.compression.grids import SymmetricGrid
from lightllm.compression.layers import prunable_layers
from lightllm.compression.schemes import SchemeName, Target, make_scheme
from lightllm.models import DoRA, LoRA

INTX: dict[SchemeName, Any] = {
    "int8_dynamic_int4": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(16)
    ),
    "int4_weight_only": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}
INT8: dict[SchemeName, Any] = {
    "int8_weight_only": Int8WeightOnlyConfig(set_inductor_config=False),
    "int8_dynamic_int8": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
}


def llama(dtype: torch.dtype = torch.float32, vocab_size: int = 320) -> PreTrainedModel:
    torch.manual_seed(0)
    network = tiny_architecture("llama", vocab_size=vocab_size)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(token_rows()).logits


def in_blocks(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INTX)
def test_a_network_computes_as_torchaos_does_before_and_after_its_conversion(
    name: SchemeName, dtype: torch.dtype
) -> None:
    network, theirs = llama(dtype), llama(dtype)
    before = logits(network)
    switch_on(network, make_scheme(name, 16))
    found = logits(network)
    assert not torch.allclose(found, before, atol=1e-2)
    quantize_(theirs, QATConfig(INTX[name], step="prepare"), in_blocks)
    assert torch.equal(found, logits(theirs))
    quantize_(theirs, QATConfig(INTX[name], step="convert"), lambda *_: True)
    assert torch.equal(found, logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INT8)
def test_int8_schemes_compute_as_torchaos_tensors(name: SchemeName, dtype: torch.dtype) -> None:
    """Layer by layer: torchao multiplies integers, and scales the sums."""
    network, theirs = llama(dtype), llama(dtype)
    switch_on(network, make_scheme(name))
    quantize_(theirs, INT8[name], in_blocks)
    for layer_name, layer in effective_layers(network).items():
        other = theirs.get_submodule(layer_name)
        weight = layer.effect.fake_quantizer.weight(layer.base.weight)  # type: ignore[union-attr]
        assert torch.equal(weight, other.weight.dequantize()), layer_name
        inputs = torch.randn(4, 7, weight.shape[1], dtype=dtype)
        found, expected = layer(inputs), other(inputs)  # type: ignore[operator]
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", ["int8_dynamic_int4", "int8_weight_only"])
def test_gradients_go_straight_through_and_nothing_is_kept_for_them(name: SchemeName) -> None:
    quantizer = GridFakeQuantizer(make_scheme(name, 16), SharedInputs())
    weight, inputs = torch.randn(8, 32, requires_grad=True), torch.randn(3, 32, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rounded, rounded_inputs = quantizer.weight(weight), quantizer.inputs(inputs)
    assert not kept
    factor = torch.randn(8, 32)
    (rounded * factor).sum().backward()
    assert torch.equal(weight.grad, factor)
    assert (rounded_inputs is inputs) == (name == "int8_weight_only")
    rounded_inputs.square().sum().backward()
    torch.testing.assert_close(inputs.grad, 2 * rounded_inputs.detach())


def test_layers_that_read_the_same_tensor_round_it_once() -> None:
    calls: list[Tensor] = []

    def count(inputs: Tensor) -> Tensor:
        calls.append(inputs)
        return inputs.round()

    shared, inputs = SharedInputs(), torch.randn(3, 4, requires_grad=True)
    first = shared.rounded(inputs, count)
    assert shared.rounded(inputs, count) is first
    assert len(calls) == 1
    (first.sum() + 2 * shared.rounded(inputs, count).sum()).backward()
    assert torch.equal(inputs.grad, torch.full((3, 4), 3.0))
    with torch.no_grad():
        assert not shared.rounded(inputs, count).requires_grad
        inputs += 1
    assert torch.equal(shared.rounded(inputs, count), inputs.round())
    assert torch.equal(shared.rounded(inputs.clone(), count), inputs.round())
    assert len(calls) == 4
    with torch.inference_mode():
        made = torch.randn(2, 2)
        assert shared.rounded(made, count) is shared.rounded(made, count)
    copy.deepcopy(shared).rounded(made, count)
    assert len(calls) == 6


def test_queries_keys_and_values_share_and_so_do_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    network = llama()
    scheme = make_scheme("int8_dynamic_int4", 16)
    count = 0
    rounding = scheme.inputs
    assert rounding is not None

    def counted(inputs: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return rounding(inputs)

    for layer in fake_quantize(network, scheme._replace(inputs=counted), []).values():
        layer.effect.fake_quantizer.enabled = True  # type: ignore[union-attr]
    logits(network)
    assert count == 2 * 4, "in each of two blocks: attention, its output, the MLP, its output"


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_gradients_with_checkpointing_are_those_without(adapter: LoRA | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = objective(scratch(), copy.deepcopy(adapter), gradient_checkpointing=checkpointing).built_network
        switch_on(network, make_scheme("int8_dynamic_int4", 16))
        network.train()
        network(token_rows(40)).logits.float().square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated")  # torch's compiler does
@pytest.mark.parametrize("target", ["torchao", "gguf"])
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_compiled_layers_compute_the_same(adapter: LoRA | None, target: Target) -> None:
    network = objective(scratch(intermediate_size=64), copy.deepcopy(adapter)).built_network
    switch_on(network, make_scheme("int8_dynamic_int4", None, target))
    layer = effective_layers(network)["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, nn.Module)
    inputs = torch.randn(2, 5, 32)
    outcomes = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = inputs.clone().requires_grad_()
        output = function(leaf)
        output.square().sum().backward()
        outcomes.append([output, leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
        layer.zero_grad()
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_scales_stay_and_clip() -> None:
    quantizer = GridFakeQuantizer(make_scheme("int4_weight_only", 16), SharedInputs())
    quantizer.enabled = True
    weight = torch.randn(8, 32)
    quantizer.freeze_scales(weight)
    scales = quantizer.frozen_scales.clone()
    assert torch.equal(quantizer.weight(weight), SymmetricGrid(4, 16).round_weight(weight))
    grown = (3 * weight).requires_grad_()
    rounded = quantizer.weight(grown)
    assert torch.equal(quantizer.frozen_scales, scales)
    steps = grown.detach().unflatten(1, (2, 16)) / scales
    torch.testing.assert_close(rounded.unflatten(1, (2, 16)) / scales, steps.round().clamp(-8, 7))
    rounded.sum().backward()
    assert torch.equal(grown.grad != 0, ((steps > -8.5) & (steps < 7.5)).flatten(1))
    assert 0 < (grown.grad == 0).sum() < grown.numel()


def test_state_is_in_checkpoints() -> None:
    def new() -> GridFakeQuantizer:
        return GridFakeQuantizer(make_scheme("int4_weight_only", 16), SharedInputs())

    quantizer = new()
    weight = torch.randn(8, 32)
    for state in ("off", "on", "frozen"):
        quantizer.enabled = state != "off"
        if state == "frozen":
            quantizer.freeze_scales(weight * 2)
        again = new()
        again.load_state_dict(quantizer.state_dict())
        assert again.enabled == quantizer.enabled
        assert again.is_straight_through == quantizer.is_straight_through
        assert torch.equal(again.frozen_scales, quantizer.frozen_scales)
        assert torch.equal(again.weight(weight), quantizer.weight(weight))
    off = new()
    again.load_state_dict(off.state_dict())
    assert not again.enabled
    assert again.is_straight_through


@pytest.mark.parametrize("target", ["torchao", "gguf"])
def test_stored_weights_are_the_effective_ones(target: Target) -> None:
    network = objective(scratch(), LoRA(rank=2)).built_network
    (layers,) = [fake_quantize(network, make_scheme("int4_weight_only", None, target), ["down_proj"])]
    for layer in layers.values():
        quantizer = layer.effect.fake_quantizer
        assert isinstance(quantizer, GridFakeQuantizer)
        quantizer.enabled = True
        stored = quantizer.low_bits(layer.merged_weight())
        assert stored.integers.dtype == torch.int8
        assert torch.equal(stored.dense(), layer.effective_weight())
    weight = torch.randn(4, 32)
    twice = SymmetricGrid(4, 32).scales(weight)[:, None] * 2
    assert torch.equal(to_low_bits(weight, SymmetricGrid(4, 32), twice).scales, twice.squeeze(-1))


def test_masked_weights_stay_zero() -> None:
    network = objective(scratch()).built_network
    switch_on(network, make_scheme("int4_weight_only", 16))
    for layer in effective_layers(network).values():
        layer.effect.masking = FixedMask(layer.base.weight.shape, layer.base.weight.device)
        keep = torch.rand_like(layer.base.weight) < 0.5
        layer.set_keep(keep)
        assert (layer.effective_weight()[~keep] == 0).all()
        assert layer.effective_weight()[keep].any()


def test_what_cannot_be_quantized_is_refused() -> None:
    scheme = make_scheme("int4_weight_only", 16)
    with pytest.raises(ValueError, match="variant of LoRA"):
        fake_quantize(objective(scratch(), DoRA(rank=2)).built_network, scheme, [])
    with pytest.raises(ValueError, match=r"GPT-2's Conv1D are none"):
        fake_quantize(tiny_architecture("gpt2"), scheme, [])
    with pytest.raises(ValueError, match=r"inputs, which groups of 20 do not divide"):
        fake_quantize(llama(), make_scheme("int4_weight_only", 20), [])
    network = llama()
    fake_quantize(network, scheme, ["mlp"])
    fake_quantize(network, scheme, ["self_attn"])
    assert len(effective_layers(network)) == len(prunable_layers(network))
    with pytest.raises(ValueError, match=r"q_proj is quantized already: name it in leave_out of one of the two"):
        fake_quantize(network, scheme, [])
