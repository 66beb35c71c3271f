"""Fake quantization as a step of the build pipeline."""

from __future__ import annotations

from torch import nn
from typing_extensions import override

from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.effects import effective_layers
from lightllm.compression.fake_quantizer import GridFakeQuantizer, LowBitWeight, fake_quantize
from lightllm.compression.schemes import Scheme
from lightllm.models.anatomy import has_adapter
from lightllm.models.transformation import Record, Transformation, TransformationKind


class FakeQuantization(Transformation):
    """Installs fake quantizers, switched off, behind the adapter and any mask.

    Args:
        name: Unique in a run.
        scheme: How they round.
        leave_out: Regular expressions of names of layers that get none.
        train_base: Train the base weights of the rounded layers beside their adapter.
    """

    kind = TransformationKind.FAKE_QUANTIZATION

    def __init__(self, name: str, scheme: Scheme, leave_out: list[str], train_base: bool) -> None:
        super().__init__(name)
        self.scheme = scheme
        self.leave_out = leave_out
        self.train_base = train_base
        self.layers: list[tuple[EffectiveLayer, GridFakeQuantizer]] = []
        """Those of the network that was built last, each with its quantizer."""

    @override
    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        if self.train_base and not has_adapter(network):
            raise ValueError(
                "train_base trains weights beside LoRA, and there is no adapter: leave it out, the weights train anyway"
            )
        self.layers = []
        for layer in fake_quantize(network, self.scheme, self.leave_out).values():
            quantizer = layer.effect.fake_quantizer
            assert isinstance(quantizer, GridFakeQuantizer)
            self.layers.append((layer, quantizer))
            if self.train_base:
                layer.base.weight.requires_grad_(True)
        return None


def low_bit_weights(network: nn.Module) -> dict[str, LowBitWeight]:
    """The rounded weights as a file of few bits holds them, by their layers' names in the plain network."""
    rounded = _rounded(network)
    return {name: quantizer.low_bits(layer.masked_weight()) for name, (layer, quantizer) in rounded.items()}


def quantization_schemes(network: nn.Module) -> set[Scheme]:
    """How layers of a network are rounded: nothing, one scheme, or another for some of them."""
    return {quantizer.scheme for _, quantizer in _rounded(network).values()}


def _rounded(network: nn.Module) -> dict[str, tuple[EffectiveLayer, GridFakeQuantizer]]:
    """The layers that something rounds to a grid now."""
    found = {}
    for name, layer in effective_layers(network).items():
        quantizer = layer.effect.fake_quantizer
        if isinstance(quantizer, GridFakeQuantizer) and quantizer.enabled:
            found[name] = (layer, quantizer)
    return found
