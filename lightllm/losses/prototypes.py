"""Classes by their means: what few examples of each say of a text (prototypical networks, arXiv:1703.05175)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["euclidean", "cosine"]


def class_means(vectors: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """The mean of each class's vectors, in float32 or wider; not-a-number where a class has none.

    Args:
        vectors: `[texts, width]`.
        classes: Class of each, int64 `[texts]`.
        num_classes: How many classes there are.

    Returns:
        `[num_classes, width]`.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    sums = torch.zeros(num_classes, vectors.shape[1], dtype=dtype, device=vectors.device)
    return sums.index_add(0, classes, vectors.to(dtype)) / torch.bincount(classes, minlength=num_classes)[:, None]


def prototype_scores(vectors: Tensor, prototypes: Tensor, distance: Distance) -> Tensor:
    """How near vectors `[texts, width]` are to prototypes `[classes, width]`: higher is nearer, `[texts, classes]`.

    It is minus the squared Euclidean distance, or the cosine.
    """
    vectors = vectors.to(prototypes.dtype)
    if distance == "cosine":
        return F.normalize(vectors, dim=1) @ F.normalize(prototypes, dim=1).T
    return -(vectors[:, None] - prototypes[None]).square().sum(2)


def scores_without_own(vectors: Tensor, classes: Tensor, num_classes: int, distance: Distance) -> Tensor:
    """As `prototype_scores` by the vectors' own classes, of whose means each vector is left out where it is judged.

    So few examples can be learned from as if each had not been seen. A class of one example has no mean for it, and a
    score of minus infinity.

    Args:
        vectors: `[texts, width]`.
        classes: Class of each, int64 `[texts]`.
        num_classes: How many classes there are.
        distance: Which.

    Returns:
        `[texts, num_classes]`; minus infinity for a class that has no example, too.
    """
    counts = torch.bincount(classes, minlength=num_classes)
    means = class_means(vectors, classes, num_classes)
    means = torch.where(counts[:, None] > 0, means, 0.0)
    wide = vectors.to(means.dtype)
    others = counts[classes][:, None]
    own = (means[classes] * others - wide) / (others - 1).clamp(min=1)
    scores = prototype_scores(wide, means, distance).masked_fill(counts == 0, -torch.inf)
    if distance == "cosine":
        near = (F.normalize(wide, dim=1) * F.normalize(own, dim=1)).sum(1)
    else:
        near = -(wide - own).square().sum(1)
    near = near.masked_fill(others[:, 0] == 1, -torch.inf)
    return scores.scatter(1, classes[:, None], near[:, None])
