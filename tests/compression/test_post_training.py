from __future__ import annotations

from typing import get_args

import pytest
import torch
from fake_quantized import wide_llama
from tiny_networks import token_rows
from tiny_objective import cut, documents
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

from lightllm.compression.effects import effective_layers
from lightllm.compression.fake_quantization import low_bit_weights
from lightllm.compression.fake_quantizer import GridFakeQuantizer
from lightllm.compression.gptq import gptq
from lightllm.compression.layers import prunable_layers
from lightllm.compression.post_training import quantize_by_gptq, quantize_to_nearest
from lightllm.compression.schemes import SchemeName, make_scheme
from lightllm.models.hidden_states import hidden_states

TORCHAO = {
    "int8_dynamic_int4": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
    "int4_weight_only": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int8_weight_only": Int8WeightOnlyConfig(set_inductor_config=False),
    "int8_dynamic_int8": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
}
BATCHES = cut(documents(12), [6, 6], packed=True)


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(token_rows()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", get_args(SchemeName))
def test_to_nearest_is_what_torchao_does(name: SchemeName, dtype: torch.dtype) -> None:
    ours, theirs = wide_llama(), wide_llama()
    for network in (ours, theirs):
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
    quantize_to_nearest(ours, make_scheme(name), ["o_proj"])
    quantize_(theirs, TORCHAO[name], lambda module, path: path in effective_layers(ours))
    assert len(effective_layers(ours)) == 12
    stored = low_bit_weights(ours)
    for path, layer in effective_layers(ours).items():
        tensor = theirs.get_submodule(path).weight
        assert torch.equal(stored[path].integers, tensor.qdata)
        assert torch.equal(stored[path].scales.view(tensor.scale.shape), tensor.scale)
        assert torch.equal(layer.effective_weight().to(dtype), tensor.dequantize())
    if "int4" in name:
        assert torch.equal(logits(ours), logits(theirs))


def test_gptq_fits_every_block_to_what_the_rounded_blocks_before_it_give() -> None:
    """Against hooks on the network as it is when the block's turn comes."""
    scheme = make_scheme("int8_dynamic_int4")
    network, plain = wide_llama(), wide_llama()
    quantize_by_gptq(network, scheme, [], BATCHES)
    for block in (0, 1):
        half = wide_llama()
        if block:
            quantize_by_gptq(half, scheme, [r"layers\.1\."], BATCHES)
        layer = half.get_submodule(f"model.layers.{block}.mlp.gate_proj")
        seen: list[Tensor] = []
        layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].detach().flatten(0, 1)))
        with torch.no_grad():
            for batch in BATCHES:
                hidden_states(half, batch)
        inputs = torch.cat(seen)
        weight = plain.get_submodule(f"model.layers.{block}.mlp.gate_proj").weight.detach()
        expected = gptq(weight, inputs.T @ inputs, scheme.grid)
        found = effective_layers(network)[f"model.layers.{block}.mlp.gate_proj"]
        same = (found.effective_weight() - expected.weight).abs() < 1e-5
        assert same.float().mean() > 0.99, "but for what lies between two integers"


@pytest.mark.parametrize("target", ["torchao", "gguf"])
def test_gptq_is_on_the_grid_and_nearer_than_rounding(target: str) -> None:
    scheme = make_scheme("int4_weight_only", target=target)  # type: ignore[arg-type]
    plain, nearest, better = wide_llama(), wide_llama(), wide_llama()
    quantize_to_nearest(nearest, scheme, [])
    quantize_by_gptq(better, scheme, [], BATCHES)
    errors = []
    for network in (nearest, better):
        with torch.no_grad():
            errors.append(
                sum((hidden_states(network, b) - hidden_states(plain, b)).square().sum().item() for b in BATCHES)
            )
    assert errors[1] < 0.8 * errors[0]
    for layer in effective_layers(better).values():
        quantizer = layer.effect.fake_quantizer
        assert isinstance(quantizer, GridFakeQuantizer)
        assert torch.equal(
            scheme.grid.round_weight(layer.masked_weight(), quantizer.frozen_scales), layer.masked_weight()
        )


def test_a_pruned_network_stays_as_sparse_as_it_is() -> None:
    network = wide_llama()
    keep = {}
    with torch.no_grad():
        for name in prunable_layers(network):
            weight = network.get_parameter(f"{name}.weight")
            keep[name] = torch.rand(weight.shape) < 0.5
            weight.mul_(keep[name])
    quantize_by_gptq(network, make_scheme("int8_weight_only"), [], BATCHES)
    for name, layer in effective_layers(network).items():
        assert (layer.effective_weight()[~keep[name]] == 0).all()
        assert layer.effective_weight()[keep[name]].count_nonzero() > 0.9 * keep[name].sum()


def test_without_data_there_is_nothing_to_fit_to() -> None:
    with pytest.raises(ValueError, match="there is no calibration data"):
        quantize_by_gptq(wide_llama(), make_scheme("int4_weight_only"), [], [])
