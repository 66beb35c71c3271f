"""A layer and inputs for it whose features are correlated, of very different sizes, and one of them always zero."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_and_inputs(
    out: int = 7, width: int = 24, positions: int = 200, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """A weight `[out, in]` and inputs `[positions, in]` in float64, after the test's seed; input 5 is never there.

    Inputs of a rank are nearly of that rank: as redundant as those of a trained network.
    """
    mixing = torch.randn(width, width, dtype=torch.float64)
    if rank is not None:
        mixing = 0.3 * mixing + torch.randn(width, rank, dtype=torch.float64) @ mixing[:rank]
    inputs = torch.randn(positions, width, dtype=torch.float64) @ mixing * (1 + 3 * torch.rand(width))
    inputs[:, 5] = 0
    return torch.randn(out, width, dtype=torch.float64), inputs


def damped(inputs: Tensor, damping: float) -> Tensor:
    """`X' X` with a share of its mean diagonal added to the diagonal, and 1 for an input that is never there."""
    moment = inputs.T @ inputs
    diagonal = moment.diagonal()
    return moment + torch.diag(damping * diagonal.mean() + (diagonal == 0).to(diagonal.dtype))


def output_error(change: Tensor, inputs: Tensor) -> float:
    """How much a layer's outputs change, squared and summed over all positions."""
    return float((inputs @ change.T).square().sum())
