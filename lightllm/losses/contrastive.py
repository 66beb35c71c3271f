"""Losses that draw texts that belong together near each other, and all others apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    temperature: float = 0.05,
    excluded: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """How badly each anchor's own candidate is told from all the others, by cosine (InfoNCE, arXiv:1807.03748).

    With `s_ij` the cosine of anchor i and candidate j divided by `temperature`, and p(i) the candidate of anchor i,

        loss_i = log sum_j exp s_ij - s_ip(i)

    and, if symmetric, half of that and half of the same with anchors as candidates of the p(i).

    Args:
        anchors: `[anchors, width]`.
        candidates: Positives and negatives of all anchors, `[candidates, width]`.
        positives: Index of each anchor's own candidate, int64 `[anchors]`.
        temperature: Of the softmax.
        excluded: Candidates that are no negatives of an anchor, bool `[anchors, candidates]`; its own one is kept.
        symmetric: Have the anchors told apart too.

    Returns:
        The losses `[anchors]`, in float32 or wider.
    """
    similarities = _cosines(anchors, candidates) / temperature
    if excluded is not None:
        own = F.one_hot(positives, len(candidates)).bool()
        similarities = similarities.masked_fill(excluded & ~own, -torch.inf)
    losses = F.cross_entropy(similarities, positives, reduction="none")
    if not symmetric:
        return losses
    columns = similarities[:, positives].T
    return (losses + F.cross_entropy(columns, torch.arange(len(anchors), device=anchors.device), reduction="none")) / 2


def matryoshka_info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    widths: Sequence[int],
    temperature: float = 0.05,
    excluded: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """The mean of `info_nce` over embeddings cut to their first `widths` numbers (arXiv:2205.13147).

    Arguments and result are those of `info_nce`.
    """
    losses = [
        info_nce(anchors[:, :width], candidates[:, :width], positives, temperature, excluded, symmetric)
        for width in widths
    ]
    return torch.stack(losses).mean(0)


def _cosines(anchors: Tensor, candidates: Tensor) -> Tensor:
    """`[anchors, candidates]`; half precision has too few digits for a softmax over many."""
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        return F.normalize(anchors.to(dtype), dim=1) @ F.normalize(candidates.to(dtype), dim=1).T
