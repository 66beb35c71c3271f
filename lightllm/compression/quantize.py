"""Networks of torchao's low-bit tensors, made of integers and scales as they are given.

Torchao takes a second to import, so it is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig

from lightllm.compression.fake_quantizer import LowBitWeight
from lightllm.compression.schemes import Scheme

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig


def torchao_config(scheme: Scheme) -> AOBaseConfig:
    """The configuration by which torchao does what a scheme says.

    Raises:
        ValueError: The scheme's numbers are another format's, or torchao is missing.
    """
    if scheme.target != "torchao":
        raise ValueError("these are GGUF's numbers, which torchao has no activations for: export with --format gguf")
    try:
        from torchao import quantization
    except ImportError as error:
        raise ValueError("quantizing with torchao needs the package: pip install 'lightllm[quantize]'") from error
    size = scheme.grid.group_size
    if scheme.name == "int8_weight_only":
        granularity = quantization.PerRow() if size is None else quantization.PerGroup(size)
        return quantization.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    if scheme.name == "int8_dynamic_int8":
        return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    assert size is not None
    if scheme.name == "int4_weight_only":
        return quantization.IntxWeightOnlyConfig(weight_dtype=_int4(), granularity=quantization.PerGroup(size))
    return quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_int4(), weight_granularity=quantization.PerGroup(size)
    )


def store_layers(network: PreTrainedModel, scheme: Scheme, weights: Mapping[str, LowBitWeight]) -> None:
    """Put weights that are rounded already into torchao's tensors, in place.

    Args:
        network: A plain network.
        scheme: By which they were rounded.
        weights: By the names of their layers.

    Raises:
        ValueError: See `torchao_config`.
    """
    configuration = torchao_config(scheme)
    layers = _linear_layers(network, weights)
    for name, layer in layers.items():
        stored = _tensor(weights[name], scheme, layer.weight.dtype)
        layer.weight = nn.Parameter(stored, requires_grad=False)
    _declare(network, configuration, layers)


def is_stored(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of torchao's."""
    if "torchao" not in sys.modules:  # then there is none
        return False
    from torchao.utils import TorchAOBaseTensor

    return isinstance(tensor, TorchAOBaseTensor)


def stored_weight(layer: nn.Module) -> Tensor:
    """What a layer of torchao's tensors multiplies by, `[out, in]` in float32."""
    weight = layer.get_parameter("weight")
    dense: Tensor = weight.dequantize()
    return dense.detach().float()


def _int4() -> torch.dtype:
    dtype: torch.dtype = vars(torch)["int4"]  # which torch has, and its types don't say
    return dtype


def _linear_layers(network: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Linear]:
    layers = {}
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layers[name] = layer
    return layers


def _tensor(weight: LowBitWeight, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    group_size = weight.integers.shape[1] // weight.scales.shape[1]
    zeros = torch.zeros_like(weight.scales, dtype=torch.int8)
    scales = weight.scales.float() if dtype == torch.float32 or scheme.grid.bits == 8 else weight.scales
    if scheme.grid.bits == 4:
        kind = "int8_asym_per_token" if scheme.inputs is not None else None
        tensor: Tensor = IntxUnpackedToInt8Tensor(weight.integers, scales, zeros, _int4(), (1, group_size), dtype, kind)
        return tensor
    inputs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if scheme.inputs is not None else None
    stored: Tensor = Int8Tensor(
        weight.integers, scales, [1, group_size], dtype, zero_point=zeros, act_quant_kwargs=inputs
    )
    return stored


def _declare(network: PreTrainedModel, configuration: AOBaseConfig, quantized: Mapping[str, nn.Linear]) -> None:
    """Have transformers save and load the network as a quantized one."""
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer  # it imports torchao

    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    declared = TorchAoConfig(configuration, modules_to_not_convert=[name for name in linear if name not in quantized])
    network.config.quantization_config = declared
    vars(network)["hf_quantizer"] = TorchAoHfQuantizer(declared, pre_quantized=True)
