"""Networks whose layers are rounded, as if they had been trained so."""

from __future__ import annotations

import torch
from tiny_architectures import tiny_architecture
from torch import nn

from lightllm.compression.fake_quantizer import GridFakeQuantizer, fake_quantize
from lightllm.compression.schemes import Scheme


def switch_on(network: nn.Module, scheme: Scheme, leave_out: list[str] | None = None) -> list[GridFakeQuantizer]:
    """Round the linear layers of a network's blocks from now on."""
    quantizers = []
    for layer in fake_quantize(network, scheme, leave_out or []).values():
        quantizer = layer.effect.fake_quantizer
        assert isinstance(quantizer, GridFakeQuantizer)
        quantizer.enabled = True
        quantizers.append(quantizer)
    return quantizers


def wide_llama() -> nn.Module:
    """A small llama with a tied head, whose rows all divide into blocks of 32."""
    torch.manual_seed(0)
    return tiny_architecture("llama", vocab_size=320, intermediate_size=64, tie_word_embeddings=True)


def rounded_llama(scheme: Scheme, freeze: bool = False) -> nn.Module:
    """A `wide_llama` that is rounded; with `freeze` by scales that its weights don't have."""
    network = wide_llama()
    switch_on(network, scheme)
    if freeze:
        from lightllm.compression.effects import effective_layers

        for layer in effective_layers(network).values():
            quantizer = layer.effect.fake_quantizer
            assert isinstance(quantizer, GridFakeQuantizer)
            quantizer.freeze_scales(layer.masked_weight() * 1.3)
    return network
