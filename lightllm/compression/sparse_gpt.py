"""SparseGPT: prune a layer so that its output changes least, the weights that stay making up for those that go.

Frantar & Alistarh, arXiv:2301.00774.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightllm.compression.masks import Amount, Pattern, layer_mask, lowest, num_pruned
from lightllm.compression.second_order import inverse_factor, replace_columns, wide


class Pruned(NamedTuple):
    """A pruned layer."""

    weight: Tensor
    """`[out, in]`, 0 where it is pruned; float32, or float64 for a double weight."""
    keep: Tensor
    """Its mask, bool `[out, in]`."""


def sparse_gpt(
    weight: Tensor,
    second_moment: Tensor,
    amount: Amount,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    among: Tensor | None = None,
) -> Pruned:
    """Prune the weights of a layer that matter least to its output, and adapt the others.

    Which weights go is decided for `block_size` columns at a time (a pattern: for its own group of columns), when the
    columns before have been pruned and made up for: those with the lowest `w^2 / U_cc^2`, where `U' U` is the inverse
    of the inputs' second moment. Each block loses its share of the weights, so that the layer loses exactly as many as
    asked; within a block, rows may lose more or less.

    Args:
        weight: `[out, in]`; stays as it is.
        second_moment: `X' X` of the layer's inputs, `[in, in]`.
        amount: The share to prune, or the pattern.
        block_size: Columns for which the mask is decided at once; for a pattern, a multiple of its group.
        damping: Added to the second moment's diagonal, as a share of its mean.
        among: bool `[out, in]`: weights that are pruned already where it is False, which go first.

    Returns:
        The new weight, and its mask.

    Raises:
        ValueError: See `inverse_factor`; or a pattern that fits neither the layer nor the block size.
    """
    group = amount.group if isinstance(amount, Pattern) else block_size
    if block_size % group:
        raise ValueError(f"block_size is {block_size}, which cuts the groups of {amount}: give a multiple of {group}")
    factor = inverse_factor(second_moment.to(wide(weight).dtype), damping)
    scale, never = factor.diagonal(), second_moment.diagonal() == 0
    keep = torch.ones_like(weight, dtype=torch.bool)
    height, width = weight.shape

    def replace(column: int, current: Tensor) -> Tensor:
        if column % group == 0:
            block = slice(column, min(column + group, width))
            scores = (current[:, block] / scale[block]).square().masked_fill_(never[block], 0.0)
            if among is not None:
                scores.masked_fill_(~among[:, block], -torch.inf)
            if isinstance(amount, Pattern):
                keep[:, block] = layer_mask(scores, amount)
            else:
                count = num_pruned(height * block.stop, amount) - num_pruned(height * block.start, amount)
                keep[:, block] = ~lowest(scores.flatten(), count).view_as(scores)
        return current[:, column].masked_fill(~keep[:, column], 0.0)

    return Pruned(replace_columns(wide(weight), factor, replace, block_size), keep)


def fit_to_mask(
    weight: Tensor, second_moment: Tensor, keep: Tensor, *, block_size: int = 128, damping: float = 0.01
) -> Tensor:
    """Adapt the weights that a given mask keeps to the loss of the others, as SparseGPT does column by column.

    Each pruned weight is made up for by the weights to its right, as well as they can: the result is the least squares
    solution for the mask where all that is pruned of a row stands left of all that stays, and near it elsewhere.

    Args:
        weight: `[out, in]`; stays as it is.
        second_moment: See `sparse_gpt`.
        keep: The mask, bool `[out, in]`.
        block_size: See `sparse_gpt`; the result does not depend on it.
        damping: See `sparse_gpt`.

    Returns:
        The new weight `[out, in]`, float32, or float64 for a double weight.

    Raises:
        ValueError: See `inverse_factor`.
    """
    factor = inverse_factor(second_moment.to(wide(weight).dtype), damping)

    def replace(column: int, current: Tensor) -> Tensor:
        return current[:, column].masked_fill(~keep[:, column], 0.0)

    return replace_columns(wide(weight), factor, replace, block_size)
