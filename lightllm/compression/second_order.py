"""What SparseGPT and GPTQ share: the second moment of a layer's inputs, and columns that make up for earlier ones.

A layer's output error over its inputs `X` `[tokens, in]` is quadratic in the change of its weight: row by row
`d H d'` with the second moment `H = X' X` `[in, in]`. When one column of the weight is given a new value, the columns
after it that lower this error the most follow from the Cholesky factor of the inverse of H (Frantar et al.,
arXiv:2210.17323, section 3.3; arXiv:2301.00774, section 3.2). Everything is float32, or float64 for a double weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightllm.compression.calibration import InputStatistics


class SecondMoment(InputStatistics):
    """`X' X` summed over all positions, float32 `[in, in]`."""

    def __init__(self) -> None:
        self.positions = 0
        """How many were counted."""
        self._sum: Tensor | None = None

    @override
    def add(self, inputs: Tensor) -> None:
        if self._sum is None:
            self._sum = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        self._sum.addmm_(inputs.T, inputs)
        self.positions += len(inputs)

    @property
    def sum(self) -> Tensor:
        """The sum so far.

        Raises:
            RuntimeError: Nothing was counted.
        """
        if self._sum is None:
            raise RuntimeError("no inputs were counted: their second moment is not known")
        return self._sum


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """The upper triangular `U` of `U' U = inverse(H + damping * mean(diagonal of H) * identity)`.

    Found from the factor of `H` with its order reversed, so that nothing is inverted but a triangle: one factorization
    instead of two and an inverse, and steadier in float32.

    Args:
        second_moment: `H`, symmetric, `[in, in]`; a sum or a mean over positions. An input that was always 0 counts as
            one that nothing else depends on.
        damping: Of the mean of H's diagonal, added to every entry of it.

    Returns:
        `[in, in]`.

    Raises:
        ValueError: The damping is negative, H is not finite, or, damped, not positive definite.
    """
    if damping < 0:
        raise ValueError(f"a damping of {damping} would make the second moment smaller: give 0 or more (0.01)")
    if not second_moment.isfinite().all():
        raise ValueError("the second moment of the layer's inputs is not finite: the network overflows on this data")
    diagonal = second_moment.diagonal()
    never = diagonal == 0
    added = damping * diagonal.mean() + never.to(diagonal.dtype)
    reversed_order = (second_moment + torch.diag(added)).flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(reversed_order)
    if failed:
        raise ValueError(
            f"the second moment of the layer's inputs is not positive definite with a damping of {damping}: raise it, "
            "or calibrate on more documents"
        )
    upper = lower.flip(0, 1)  # upper @ upper.T is H
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def replace_columns(
    weight: Tensor, factor: Tensor, replace: Callable[[int, Tensor], Tensor], block_size: int
) -> Tensor:
    """Give a weight's columns new values from left to right, each error made up for by the columns after it.

    Args:
        weight: `[out, in]`; stays as it is.
        factor: `inverse_factor` of the layer's inputs, `[in, in]`.
        replace: From the index of a column and the weight as it is now, the column's new value `[out]`. Columns to its
            right in the same block of `block_size` are up to date; those beyond are at the first column of a block.
        block_size: Columns after which those beyond are brought up to date, in one product.

    Returns:
        The new weight `[out, in]`.

    Raises:
        ValueError: The block size is no positive number.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: give at least 1 column (128)")
    width = weight.shape[1]
    columns = weight.T.contiguous()  # `[in, out]`: what is read and written at a time lies side by side
    for begin in range(0, width, block_size):
        end = min(begin + block_size, width)
        errors = columns.new_empty(end - begin, columns.shape[1])
        for column in range(begin, end):
            value = replace(column, columns.T)
            error = errors[column - begin]
            torch.div(columns[column] - value, factor[column, column], out=error)
            columns[column] = value
            columns[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return columns.T.contiguous()


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
