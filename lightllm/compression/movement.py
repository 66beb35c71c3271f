"""Masks that are learned: a weight matters if training moves it away from zero (Sanh et al., arXiv:2005.07683)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightllm.compression.effective_weight import FixedMask
from lightllm.compression.effects import install_effects
from lightllm.compression.layers import prunable_layers
from lightllm.models.transformation import Record, Transformation, TransformationKind


class LearnedMask(nn.Module):
    """`M(S) * W` with a score for each weight, whose gradient goes straight through the choice of the mask.

    With `W' = M * W`, a weight gets the gradient `dL/dW' * M`: a masked one stays what it was, so that it can come
    back. Its score gets `dL/dW' * W`, masked or not: it grows where a step of descent makes the weight larger in
    magnitude.

    Args:
        shape: `(out, in)` of the weight.
        device: The weight's.
    """

    fixed: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(shape, device=device))
        self.mask = FixedMask(shape, device)
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool, device=device))

    def fix(self) -> None:
        """Leave the mask as it is from now on; scores are learned no more."""
        self.fixed.fill_(True)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = _StraightThrough.apply(weight, self.scores, self.mask.keep)
        return masked


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(weight, keep)
        return weight * keep

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, keep = ctx.saved_tensors
        of_weight = gradient * keep if ctx.needs_input_grad[0] else None
        of_scores = (gradient * weight).float() if ctx.needs_input_grad[1] else None
        return of_weight, of_scores, None


class MaskLearning(Transformation):
    """Learned masks on the linear layers of the blocks, which keep everything at first.

    Args:
        name: Unique in a run.
        leave_out: Regular expressions of names of layers that get none.
    """

    kind = TransformationKind.MASK

    def __init__(self, name: str, leave_out: list[str]) -> None:
        super().__init__(name)
        self.leave_out = leave_out

    @override
    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        for name, layer in install_effects(network, prunable_layers(network, self.leave_out)).items():
            if layer.effect.masking is not None:
                raise ValueError(
                    f"{name} is masked already, and a learned mask would be a second: name it in leave_out"
                )
            weight = layer.base.weight
            layer.effect.masking = LearnedMask(weight.shape, weight.device)
        return None


def learned_masks(network: nn.Module) -> list[LearnedMask]:
    """The learned masks of a network."""
    return [module for module in network.modules() if isinstance(module, LearnedMask)]
