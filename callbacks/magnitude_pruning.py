"""MagnitudePruning: the smallest weights go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightllm.callbacks.pruning import Pruning
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masking import Masking
from lightllm.compression.masks import Amount, Pattern, layer_mask, network_masks

if TYPE_CHECKING:
    from lightllm.models.transformation import Transformation
    from lightllm.modules.base import LanguageModule


class MagnitudePruning(Pruning):
    """Prunes the weights of the smallest magnitude, under LoRA of the merged weight; see `Pruning`.

    It needs no data, but ignores which inputs are large: `WandaPruning` costs a pass over a few documents and does
    better without training after it.

    Args:
        sparsity: See `Pruning`.
        pattern: See `Pruning`.
        budget: `layer` prunes the same share of each layer; `network` the smallest weights of all, wherever they are.
        common: The other fields of `Pruning`.

    Raises:
        ValueError: See `Pruning`; or a pattern with the budget of the network.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        budget: Literal["layer", "network"] = "layer",
        **common: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **common)
        if self.pattern is not None and budget == "network":
            raise ValueError(f"{self.pattern} prunes the same share of every layer: set budget to layer")
        self.budget = budget

    @override
    def transformation(self) -> Transformation:
        return Masking(type(self).__name__, self.leave_out)

    @override
    def prune(self, pl_module: LanguageModule, layers: dict[str, EffectiveLayer], amount: Amount) -> None:
        if self.budget == "network" and not isinstance(amount, Pattern):
            masks = network_masks({name: _magnitudes(layer) for name, layer in layers.items()}, amount)
            for name, keep in masks.items():
                layers[name].set_keep(keep)
            return
        for layer in layers.values():
            layer.set_keep(layer_mask(_magnitudes(layer), amount))


def _magnitudes(layer: EffectiveLayer) -> Tensor:
    """Scores `[out, in]` by which what is pruned already goes first."""
    return layer.merged_weight().abs().masked_fill_(~layer.fixed_mask().keep, -torch.inf)
