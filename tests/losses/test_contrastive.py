from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightllm.losses import info_nce, matryoshka_info_nce


def vectors(count: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one @ other) / (one.norm() * other.norm()))


def plain(
    anchors: Tensor, candidates: Tensor, positives: list[int], temperature: float, out: set[tuple[int, int]]
) -> list[float]:
    losses = []
    for i, anchor in enumerate(anchors):
        scores = {
            j: cosine(anchor, candidate) / temperature for j, candidate in enumerate(candidates) if (i, j) not in out
        }
        losses.append(math.log(sum(math.exp(score) for score in scores.values())) - scores[positives[i]])
    return losses


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_loss_is_that_of_a_plain_loop(temperature: float) -> None:
    anchors, candidates = vectors(4), vectors(9, seed=1)
    positives = [2, 0, 7, 5]
    out = {(0, 3), (2, 8), (3, 0)}
    excluded = torch.zeros(4, 9, dtype=torch.bool)
    for place in out:
        excluded[place] = True
    found = info_nce(anchors, candidates, torch.tensor(positives), temperature, excluded)
    assert found.tolist() == pytest.approx(plain(anchors, candidates, positives, temperature, out))


def test_symmetric_loss_tells_anchors_apart_too() -> None:
    anchors, candidates = vectors(4), vectors(7, seed=1)
    own = torch.arange(4)
    found = info_nce(anchors, candidates, own, 0.1, symmetric=True)
    there = plain(anchors, candidates, [0, 1, 2, 3], 0.1, set())
    back = plain(candidates[:4], anchors, [0, 1, 2, 3], 0.1, set())
    assert found.tolist() == pytest.approx([(one + other) / 2 for one, other in zip(there, back, strict=True)])


def test_the_own_candidate_is_never_excluded() -> None:
    anchors = vectors(3)
    found = info_nce(anchors, anchors, torch.arange(3), excluded=torch.ones(3, 3, dtype=torch.bool))
    assert found.tolist() == pytest.approx([0.0] * 3)


def test_matryoshka_is_the_mean_over_cut_embeddings() -> None:
    anchors, candidates = vectors(4), vectors(4, seed=1)
    own = torch.arange(4)
    found = matryoshka_info_nce(anchors, candidates, own, [2, 6], 0.1)
    parts = [plain(anchors[:, :w], candidates[:, :w], [0, 1, 2, 3], 0.1, set()) for w in (2, 6)]
    assert found.tolist() == pytest.approx([(one + other) / 2 for one, other in zip(*parts, strict=True)])


def test_half_precision_is_widened() -> None:
    anchors = vectors(4).bfloat16()
    found = info_nce(anchors, anchors, torch.arange(4))
    assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(anchors, anchors, torch.arange(4))
    assert torch.equal(found, inside)


def test_gradients_are_right() -> None:
    anchors, candidates = vectors(3).requires_grad_(), vectors(5, seed=1).requires_grad_()
    own = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(
        lambda a, c: matryoshka_info_nce(a, c, own, [3, 6], 0.3, symmetric=True), (anchors, candidates)
    )


@pytest.mark.filterwarnings("ignore")  # of another package's imports
def test_loss_is_sentence_transformers_own() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    anchors, positives, negatives = (vectors(5, seed=seed).float() for seed in range(3))
    theirs = losses.MultipleNegativesRankingLoss(None, scale=20.0)
    expected = theirs.compute_loss_from_embeddings([anchors, positives, negatives], None)
    found = info_nce(anchors, torch.cat([positives, negatives]), torch.arange(5), 0.05)
    torch.testing.assert_close(found.mean(), expected)
