from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.modules.embedding_metrics import EmbeddingMetrics


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def ranks(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Mean ranks, by a plain count."""
    return np.array([(values < one).sum() + ((values == one).sum() - 1) / 2 for one in values])


def test_numbers_are_those_of_a_plain_search() -> None:
    anchors, positives = vectors(40, 0), vectors(40, 0) + vectors(40, 1)
    positives[7] = positives[3]  # the same text
    digests = torch.arange(40)
    digests[7] = 3
    own = 100 + torch.arange(40)
    own[9] = 20  # this anchor is the positive of another, which would find itself
    anchors[9] = positives[20]
    levels = torch.arange(40) % 7
    levels[5] = IGNORE_INDEX
    losses = torch.rand(40)
    metrics = EmbeddingMetrics()
    for part in (slice(0, 13), slice(13, 40)):
        metrics.update(losses[part], anchors[part], positives[part], digests[part], own[part], levels[part])
    values = {name: float(value) for name, value in metrics.compute().items()}
    cosines = torch.nn.functional.cosine_similarity(anchors[:, None], positives[None], dim=-1).numpy()
    kept = [index for index in range(40) if index != 7]
    places = []
    for anchor in range(40):
        right = 3 if anchor == 7 else anchor
        others = [one for one in kept if (anchor, one) != (9, 20)]
        places.append(1 + sum(cosines[anchor, other] > cosines[anchor, right] for other in others))
    found = np.array(places)
    assert values["loss"] == pytest.approx(float(losses.mean()))
    assert values["recall_at_1"] == pytest.approx((found <= 1).mean())
    assert values["recall_at_10"] == pytest.approx((found <= 10).mean())
    assert values["reciprocal_rank"] == pytest.approx((1 / found).mean(), rel=1e-5)
    said = [index for index in range(40) if index != 5]
    own_cosines = np.array([cosines[index, index] for index in said])
    expected = np.corrcoef(ranks(own_cosines), ranks(levels[said].double().numpy()))[0, 1]
    assert values["spearman"] == pytest.approx(expected, abs=1e-5)


def test_texts_without_pairs_have_a_loss_alone() -> None:
    metrics = EmbeddingMetrics()
    none = torch.zeros(0, 3)
    nothing = torch.zeros(0, dtype=torch.int64)
    metrics.update(torch.tensor([1.0, 2.0]), none, none, nothing, nothing, nothing)
    assert set(metrics.compute()) == {"loss"}
