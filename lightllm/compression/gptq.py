"""GPTQ: round a layer so that its output changes least, later columns making up for the rounding of earlier ones.

Frantar et al., arXiv:2210.17323.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightllm.compression.grids import Grid
from lightllm.compression.second_order import inverse_factor, replace_columns, wide


class Rounded(NamedTuple):
    """A layer on a grid."""

    weight: Tensor
    """`[out, in]`, exactly on the grid with these scales; float32, or float64 for a double weight."""
    scales: Tensor
    """`[out, groups, 1]`, as `Grid.round_weight` takes them. They must be kept: those that the grid would find for the
    rounded weight can be others, since a group's largest weight may have been rounded down to make up for another."""


def gptq(
    weight: Tensor,
    second_moment: Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    activation_order: bool = False,
    keep_zeros: bool = False,
) -> Rounded:
    """Round a weight to a grid, column by column.

    Args:
        weight: `[out, in]`; stays as it is.
        second_moment: `X' X` of the layer's inputs, `[in, in]`.
        grid: What to round to. Groups of neighbours share a scale, also in activation order.
        block_size: Columns that are brought up to date at once, fewer or more where it would cut groups; the result
            does not depend on it.
        damping: Added to the second moment's diagonal, as a share of its mean.
        activation_order: Begin with the columns whose inputs are largest, when all others can still make up for them.
            Scales are those of the weight as it was; without it, those of each group when its turn comes.
        keep_zeros: What is zero stays zero: a pruned weight keeps its mask. What others make up for includes that.

    Returns:
        The rounded weight, and its scales.

    Raises:
        ValueError: See `inverse_factor` and `Grid.groups`.
    """
    weight = wide(weight)
    second_moment = second_moment.to(weight.dtype)
    groups = grid.groups(weight)
    size = groups.shape[-1]
    kept = weight != 0 if keep_zeros else torch.ones_like(weight, dtype=torch.bool)
    if size <= block_size:
        block_size -= block_size % size
    elif block_size > 0 and size % block_size and size < weight.shape[1]:
        block_size = size
    if activation_order:
        scales = grid.scales(groups)
        order = second_moment.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(second_moment[order][:, order], damping)
        rounded = replace_columns(
            weight[:, order],
            factor,
            lambda column, now: _on_grid(grid, now, column, scales[:, order[column] // size]) * kept[:, order[column]],
            block_size,
        )
        return Rounded(rounded[:, order.argsort()], scales)
    found: list[Tensor] = []

    def replace(column: int, current: Tensor) -> Tensor:
        if column % size == 0:
            found.append(grid.scales(current[:, column : column + size].contiguous()))
        return _on_grid(grid, current, column, found[-1]) * kept[:, column]

    rounded = replace_columns(weight, inverse_factor(second_moment, damping), replace, block_size)
    return Rounded(rounded, torch.stack(found, dim=1))


def _on_grid(grid: Grid, current: Tensor, column: int, scales: Tensor) -> Tensor:
    """A column's values `[out]` on the grid, with the scales `[out, 1]` of its group."""
    return grid.round(current[:, column : column + 1].clone(), scales).squeeze(1).to(current.dtype)
