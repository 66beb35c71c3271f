"""Masks from scores: which weights of a layer stay, `[out, in]`, True for those that do.

Each mask prunes exactly as many weights as asked. Of equal scores the earlier ones go first (in the order of the
layers, then row by row), so that a mask depends on its scores alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """N:M sparsity: of every `group` weights that follow each other along a layer's input, at most `kept` are not 0."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4".

        Raises:
            ValueError: It is not N:M with 0 < N < M.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"the pattern {text!r} is not N:M with 0 < N < M: '2:4' keeps 2 of every 4 weights")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        return 1 - self.kept / self.group


Amount = float | Pattern
"""How much of a layer is pruned: a share between 0 and 1, or a pattern."""


def num_pruned(num_weights: int, sparsity: float) -> int:
    """How many of so many weights are pruned: `round(sparsity * num_weights)`, where halves go to the even number.

    Raises:
        ValueError: The sparsity is not between 0 and 1.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity of {sparsity} is not a share of the weights: give a number between 0 and 1")
    return round(sparsity * num_weights)


def layer_mask(scores: Tensor, amount: Amount, per_row: bool = False) -> Tensor:
    """Keep the weights with the highest scores of one layer.

    Args:
        scores: How much each weight matters, `[out, in]`.
        amount: The share to prune, or the pattern.
        per_row: Prune the same number in every row, instead of so many in the layer; a pattern always does.

    Returns:
        bool `[out, in]`.

    Raises:
        ValueError: Scores that are no numbers, or a pattern whose groups don't fill the rows.
    """
    _check_scores(scores)
    if isinstance(amount, Pattern):
        _check_width(scores, amount)
        groups = scores.unflatten(1, (-1, amount.group))
        return ~lowest(groups, amount.group - amount.kept).flatten(1)
    if per_row:
        return ~lowest(scores, num_pruned(scores.shape[1], amount))
    return ~lowest(scores.flatten(), num_pruned(scores.numel(), amount)).view_as(scores)


def network_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the weights with the highest scores of all layers together: some layers lose more, others less.

    Args:
        scores: How much each weight matters, `[out, in]` by layer, on one scale.
        sparsity: Share of all of them that is pruned.

    Returns:
        bool `[out, in]` by layer.

    Raises:
        ValueError: Scores that are no numbers.
    """
    for each in scores.values():
        _check_scores(each)
    count = num_pruned(sum(each.numel() for each in scores.values()), sparsity)
    if count == 0:
        return {name: torch.ones_like(each, dtype=torch.bool) for name, each in scores.items()}
    threshold = torch.cat([_wide(each).flatten().cpu() for each in scores.values()]).kthvalue(count).values
    equal_pruned = count - sum(int((_wide(each) < threshold.to(each.device)).sum()) for each in scores.values())
    masks = {}
    for name, each in scores.items():
        flat = _wide(each).flatten()
        equal = flat == threshold.to(flat.device)
        pruned = (flat < threshold.to(flat.device)) | (equal & (equal.cumsum(0) <= equal_pruned))
        equal_pruned = max(0, equal_pruned - int(equal.sum()))
        masks[name] = ~pruned.view_as(each)
    return masks


def sparsity_of(tensor: Tensor) -> float:
    """Share of a weight that is zero, or of a mask that is False, between 0 and 1."""
    return 1 - int(torch.count_nonzero(tensor)) / tensor.numel()


def follows(tensor: Tensor, pattern: Pattern) -> bool:
    """Whether the zeros of a weight or a mask `[out, in]` are those of N:M, which has to cut its rows evenly."""
    if tensor.ndim != 2 or tensor.shape[1] % pattern.group:
        return False
    return bool((tensor.unflatten(1, (-1, pattern.group)).count_nonzero(dim=2) <= pattern.kept).all())


def common_pattern(masks: Iterable[Tensor]) -> Pattern | None:
    """Find the pattern N:M of which every group of every mask `[out, in]` keeps exactly N; the shortest such groups.

    None if there is no mask, or none such for groups of up to 32.
    """
    masks = list(masks)
    for group in range(2, 33):
        if not masks or any(mask.shape[1] % group for mask in masks):
            continue
        kept = {number for mask in masks for number in mask.unflatten(1, (-1, group)).sum(2).unique().tolist()}
        if len(kept) == 1 and 0 < (number := kept.pop()) < group:
            return Pattern(number, group)
    return None


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest along the last dimension, of equal ones the first; bool of the same shape."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # A threshold and a count of those that equal it, since sorting a layer takes several times as long.
    scores = _wide(scores)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    return below | (equal & (equal.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


def _check_scores(scores: Tensor) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {list(scores.shape)} are not those of a linear layer: give [out, in]")
    if scores.isnan().any():
        raise ValueError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores are no numbers: the weights, or the statistics "
            "of the layer's inputs, hold NaN"
        )


def _check_width(scores: Tensor, pattern: Pattern) -> None:
    if scores.shape[1] % pattern.group:
        raise ValueError(
            f"{pattern} needs rows of a multiple of {pattern.group} weights, and a layer of shape "
            f"{list(scores.shape)} has {scores.shape[1]}: leave it out"
        )


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()
