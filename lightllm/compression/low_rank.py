"""A matrix as the product of two thin ones: by its singular values, or by those of what it computes on given inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 1e-6
"""How much is added to every input's second moment before it is factored, as a share of their mean: inputs that never
varied would make it singular."""


class Factors(NamedTuple):
    """Two thin matrices, `up @ down` in place of `[out, in]`."""

    down: Tensor
    """`[rank, in]`."""
    up: Tensor
    """`[out, rank]`."""


class Spectrum(NamedTuple):
    """A matrix taken apart, `(left * values) @ right`, in float64; its first components are the best of any rank.

    Best is what leaves the least squared error: of the weights, or of the outputs for the inputs of a second moment.
    """

    left: Tensor
    """`[out, n]`, columns orthonormal, `n = min(out, in)`."""
    values: Tensor
    """`[n]`, the singular values, descending."""
    right: Tensor
    """`[n, in]`; with a second moment its rows are orthonormal in that, and not by themselves."""

    def factors(self, rank: int) -> Factors:
        """The product of this rank that is nearest to the matrix; both factors take the same share of the values.

        Raises:
            ValueError: There are not so many components.
        """
        if not 1 <= rank <= len(self.values):
            raise ValueError(f"rank is {rank}, and the matrix has {len(self.values)} components: give 1 to as many")
        share = self.values[:rank].sqrt()
        return Factors(share[:, None] * self.right[:rank], self.left[:, :rank] * share)

    def loss(self, rank: int) -> float:
        """The squared error of `factors(rank)`: the sum of the squared singular values that it leaves out.

        It is the error's squared Frobenius norm; with a second moment, that of the outputs' error over all inputs
        which the moment is a sum over, and the damping's share of the weights' error beside it.
        """
        return float(self.values[rank:].square().sum())


def spectrum(weight: Tensor, second_moment: Tensor | None = None, damping: float = DAMPING) -> Spectrum:
    """Take a matrix apart into components, the most important first.

    Without a second moment this is the singular value decomposition of `W`. With the moment `X X'` of a layer's inputs
    (SVD-LLM, arXiv:2403.07378, section 3.1) it is that of `W S`, where `S S' = X X'`, times the inverse of `S`: then
    `|W X - W' X|^2 = |W S - W' S|^2`, and a truncation of `W S` loses just the energy of the values that are left out.

    Args:
        weight: `[out, in]`.
        second_moment: `X X'` `[in, in]`, a sum or a mean over inputs `X` `[in, tokens]`; None for plain inputs, of
            which none is more frequent than others.
        damping: Added to the moment's diagonal, as a share of its mean.

    Raises:
        ValueError: Weight or moment are not finite, or the moment is zero or of another size.
    """
    matrix = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
    if not matrix.isfinite().all():
        raise ValueError("the weight is not finite everywhere, so that it has no singular values")
    if second_moment is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Spectrum(left, values, right)
    root = _root(second_moment, matrix, damping)
    left, values, right = torch.linalg.svd(matrix @ root, full_matrices=False)
    return Spectrum(left, values, torch.linalg.solve_triangular(root, right, upper=False, left=False))


def _root(second_moment: Tensor, matrix: Tensor, damping: float) -> Tensor:
    """The lower triangular `S` of `S S'`, the damped second moment, in float64."""
    size = matrix.shape[1]
    moment = second_moment.detach().to(matrix)
    if moment.shape != (size, size):
        raise ValueError(f"the second moment is {list(moment.shape)} for a layer of {size} inputs: give [in, in]")
    scale = moment.diagonal().mean()
    if not moment.isfinite().all() or not scale > 0:
        raise ValueError("the second moment of the layer's inputs is zero or not finite: calibrate on other text")
    eye = torch.eye(size, dtype=moment.dtype, device=moment.device)
    for _ in range(8):
        root, failed = torch.linalg.cholesky_ex(moment + damping * scale * eye)
        if not failed:
            return root
        damping = max(damping, DAMPING) * 10  # rounding of sums in float32 has made it indefinite
    raise ValueError("the second moment of the layer's inputs is not positive definite: give a sum of products x x'")
