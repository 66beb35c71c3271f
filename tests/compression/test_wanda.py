from __future__ import annotations

import math

import pytest
import torch
from layer_inputs import layer_and_inputs

from lightllm.compression.masks import Pattern, follows
from lightllm.compression.wanda import SquaredNorms, wanda_mask, wanda_scores


def test_scores_weight_by_weight() -> None:
    weight, inputs = layer_and_inputs(out=3, width=8, positions=20)
    scores = wanda_scores(weight, inputs.square().sum(0))
    for i in range(3):
        for j in range(8):
            norm = math.sqrt(sum(float(x) ** 2 for x in inputs[:, j]))
            assert float(scores[i, j]) == pytest.approx(abs(float(weight[i, j])) * norm)


def test_norms_add_up_over_batches() -> None:
    inputs = torch.randn(30, 5)
    norms = SquaredNorms()
    norms.add(inputs[:10])
    norms.add(inputs[10:])
    torch.testing.assert_close(norms.sum, inputs.norm(dim=0) ** 2)
    with pytest.raises(RuntimeError, match="no inputs were counted"):
        _ = SquaredNorms().sum


def test_the_papers_algorithm_row_by_row() -> None:
    weight, inputs = layer_and_inputs(out=6, width=12)
    norms = inputs.norm(dim=0)
    keep = wanda_mask(weight, norms**2, 0.5)
    for row, kept in zip(weight, keep, strict=True):
        metric = [abs(float(w)) * float(n) for w, n in zip(row, norms, strict=True)]
        lowest = sorted(range(12), key=metric.__getitem__)[:6]
        assert set((~kept).nonzero().flatten().tolist()) == set(lowest)
    keep = wanda_mask(weight, norms**2, Pattern(2, 4))
    assert follows(keep, Pattern(2, 4))
    for i, begin in [(i, begin) for i in range(6) for begin in (0, 4, 8)]:
        metric = [abs(float(weight[i, j])) * float(norms[j]) for j in range(begin, begin + 4)]
        best = sorted(range(4), key=metric.__getitem__)[2:]
        assert set(keep[i, begin : begin + 4].nonzero().flatten().tolist()) == set(best)


def test_large_inputs_save_small_weights() -> None:
    weight = torch.tensor([[1.0, 0.1, 0.5, 0.4]])
    assert wanda_mask(weight, torch.tensor([1.0, 1e4, 1.0, 1.0]), 0.5).tolist() == [[True, True, False, False]]


def test_what_is_pruned_stays_pruned() -> None:
    weight, inputs = layer_and_inputs(out=6, width=12)
    among = torch.rand(6, 12) > 0.3
    among[:, 0] = False
    keep = wanda_mask(weight, inputs.square().sum(0), 0.75, among)
    assert not (keep & ~among).any()
    assert (keep.sum(1) == 3).all()


def test_half_precision_weights_are_scored_in_float32() -> None:
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    assert wanda_scores(weight, torch.ones(8)).dtype == torch.float32
