"""The transformation behind pruning: layers get masks, which keep everything until a schedule prunes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.effects import effective_layers, mask_layers
from lightllm.models.transformation import Record, Transformation, TransformationKind


class Masking(Transformation):
    """Fixed masks on the linear layers of the blocks.

    What they keep is part of the state dict, a bit a weight, so that nothing else has to be remembered.

    Args:
        name: Unique in a run.
        leave_out: Regular expressions of names of layers that get no mask.
    """

    kind = TransformationKind.MASK

    def __init__(self, name: str, leave_out: list[str]) -> None:
        super().__init__(name)
        self.leave_out = leave_out

    @override
    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        mask_layers(network, self.leave_out)
        return None


class MaskingAndAdapting(Masking):
    """The same where the weights that stay change too when others are pruned, frozen ones included."""

    changes_frozen_weights = True


@torch.no_grad()
def mask_of(layer: EffectiveLayer) -> Tensor | None:
    """What a layer's mask keeps, bool `[out, in]`, whether it is fixed or learned; None where there is none."""
    masking = layer.effect.masking
    return None if masking is None else masking(torch.ones_like(layer.base.weight)) != 0


def masks_of(network: nn.Module) -> dict[str, Tensor]:
    """What the masks of a network keep, by layer; see `mask_of`."""
    masks = {name: mask_of(layer) for name, layer in effective_layers(network).items()}
    return {name: keep for name, keep in masks.items() if keep is not None}
