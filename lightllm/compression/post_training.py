"""Quantization after training: to nearest, or by GPTQ on calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightllm.batch import TextBatch
from lightllm.compression.calibration import change_layer_by_layer
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.fake_quantizer import GridFakeQuantizer, fake_quantize
from lightllm.compression.gptq import gptq
from lightllm.compression.schemes import Scheme
from lightllm.compression.second_order import SecondMoment


def quantize_to_nearest(network: nn.Module, scheme: Scheme, leave_out: list[str]) -> None:
    """Round the linear layers of the blocks, in place; to the bit what torchao's `quantize_` makes of them.

    The network computes with the rounded weights, and an export as torchao's tensors or GGUF stores them.

    Args:
        network: A plain network.
        scheme: How.
        leave_out: Regular expressions of names of layers that are not rounded.

    Raises:
        ValueError: See `fake_quantize`.
    """
    for layer in fake_quantize(network, scheme, leave_out).values():
        _quantizer(layer).enabled = True


def quantize_by_gptq(network: nn.Module, scheme: Scheme, leave_out: list[str], batches: Sequence[TextBatch]) -> None:
    """The same by GPTQ, block by block: each block is fitted to what the rounded blocks before it give.

    Weights that are zero stay zero, so that a pruned network stays as sparse as it is.

    Args:
        network: A plain network.
        scheme: How.
        leave_out: Regular expressions of names of layers that are not rounded.
        batches: Calibration data.

    Raises:
        ValueError: See `fake_quantize` and `change_layer_by_layer`.
    """
    layers = fake_quantize(network, scheme, leave_out)

    @torch.no_grad()
    def change(name: str, _: nn.Module, inputs: SecondMoment) -> None:
        layer, quantizer = layers[name], _quantizer(layers[name])
        rounded = gptq(layer.merged_weight(), inputs.sum, quantizer.scheme.grid, keep_zeros=True)
        layer.write_merged(rounded.weight)
        quantizer.freeze(rounded.scales)
        quantizer.enabled = True

    modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    change_layer_by_layer(network, batches, modules, SecondMoment, change)


def _quantizer(layer: EffectiveLayer) -> GridFakeQuantizer:
    quantizer = layer.effect.fake_quantizer
    assert isinstance(quantizer, GridFakeQuantizer)
    return quantizer
