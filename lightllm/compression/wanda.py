"""Wanda: a weight matters as much as it is large and its input is (Sun et al., arXiv:2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightllm.compression.calibration import InputStatistics
from lightllm.compression.masks import Amount, layer_mask
from lightllm.compression.second_order import wide


class SquaredNorms(InputStatistics):
    """The squared length of every input over all positions, float32 `[in]`."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    @override
    def add(self, inputs: Tensor) -> None:
        squares = inputs.square().sum(0)
        self._sum = squares if self._sum is None else self._sum + squares

    @property
    def sum(self) -> Tensor:
        """The sum of squares so far.

        Raises:
            RuntimeError: Nothing was counted.
        """
        if self._sum is None:
            raise RuntimeError("no inputs were counted: their norms are not known")
        return self._sum


def wanda_scores(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """Score weights by `|W_ij| * ||X_j||_2`, `[out, in]`.

    Args:
        weight: `[out, in]`.
        squared_norms: `||X_j||^2` of each input, `[in]`; a sum or a mean over positions.
    """
    return wide(weight).abs() * wide(squared_norms).sqrt()


def wanda_mask(weight: Tensor, squared_norms: Tensor, amount: Amount, among: Tensor | None = None) -> Tensor:
    """Keep the weights with the highest scores of every row, each row losing the same number.

    Args:
        weight: `[out, in]`.
        squared_norms: See `wanda_scores`.
        amount: The share of each row to prune, or the pattern.
        among: bool `[out, in]`: weights that are pruned already where it is False, which go first.

    Returns:
        bool `[out, in]`.

    Raises:
        ValueError: See `layer_mask`.
    """
    scores = wanda_scores(weight, squared_norms)
    if among is not None:
        scores = scores.masked_fill(~among, -torch.inf)
    return layer_mask(scores, amount, per_row=True)
