"""The layer of two thin matrices in the place of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.compression.low_rank import Factors
from lightllm.models.anatomy import OwnNetwork, unwrapped
from lightllm.models.plain_tensors import MadeOfParts


class FactoredLinear(nn.Module, MadeOfParts):
    """`up(down(x))`: two ordinary linear layers, for adapters and masks to see as such.

    Args:
        in_features: Inputs of the layer that it replaces.
        out_features: Its outputs.
        rank: Between the two.
        bias: Whether there is a bias, which `up` holds.
        device: Of the weights.
        dtype: Of the weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        # Zeros and no random start: whoever makes the layer has weights for it, and random numbers are the run's.
        self.down = _zero_linear(in_features, rank, False, device, dtype)
        self.up = _zero_linear(rank, out_features, bias, device, dtype)

    @override
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.up(self.down(x))
        return output

    @override
    def plain_tensors_of(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {"weight": parts["up.weight"].float() @ parts["down.weight"].float()}
        return tensors if "up.bias" not in parts else {**tensors, "bias": parts["up.bias"]}

    @override
    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def factored(layer: nn.Linear, rank: int, factors: Factors | None = None) -> FactoredLinear:
    """A linear layer in two thin matrices, on its device and in its dtype; its bias is kept and trains if it did.

    Args:
        layer: The whole layer.
        rank: Of the product.
        factors: Their values; zeros when None, for a checkpoint to fill.
    """
    weight, bias = layer.weight, layer.bias
    made = FactoredLinear(
        layer.in_features, layer.out_features, rank, bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        if factors is not None:
            made.down.weight.copy_(factors.down)
            made.up.weight.copy_(factors.up)
        if bias is not None:
            made.up.bias = bias
    made.down.weight.requires_grad_(weight.requires_grad)
    made.up.weight.requires_grad_(weight.requires_grad)
    return made.train(layer.training)


def replace_layers(network: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put other layers in the place of those that the network has by these names."""
    base = unwrapped(network)
    if isinstance(base, OwnNetwork):
        # In evaluation, torch's own transformer layers would take the matrices past the layers that are there now.
        torch.backends.mha.set_fastpath_enabled(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, layer)


def _zero_linear(
    in_features: int, out_features: int, bias: bool, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype).to_empty(device=device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear
