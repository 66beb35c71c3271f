from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightllm.losses import class_means, prototype_scores, scores_without_own


def examples(count: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator), torch.arange(count) % 4


def test_means_are_those_of_each_class() -> None:
    vectors, classes = examples()
    means = class_means(vectors, classes, 5)
    for number in range(4):
        torch.testing.assert_close(means[number], vectors[classes == number].mean(0))
    assert means[4].isnan().all()
    assert class_means(vectors.bfloat16(), classes, 4).dtype == torch.float32


def test_nearest_mean_is_scikit_learns_nearest_centroid() -> None:
    """Whose formula is: argmin over classes of the Euclidean distance to the mean."""
    vectors, classes = examples()
    queries, _ = examples(50, seed=1)
    means = class_means(vectors, classes, 4)
    found = prototype_scores(queries, means, "euclidean").argmax(1)
    expected = torch.cdist(queries, means).argmin(1)
    assert torch.equal(found, expected)
    neighbors = pytest.importorskip("sklearn.neighbors")
    theirs = neighbors.NearestCentroid().fit(vectors.numpy(), classes.numpy()).predict(queries.numpy())
    assert found.tolist() == theirs.tolist()


def test_scores_are_distances_and_cosines() -> None:
    vectors, classes = examples()
    means = class_means(vectors, classes, 4)
    euclidean, cosine = (prototype_scores(vectors, means, kind) for kind in ("euclidean", "cosine"))  # type: ignore[arg-type]
    for text in range(5):
        for number in range(4):
            one, other = vectors[text], means[number]
            assert float(euclidean[text, number]) == pytest.approx(-float(((one - other) ** 2).sum()), rel=1e-5)
            assert float(cosine[text, number]) == pytest.approx(
                float(one @ other / one.norm() / other.norm()), abs=1e-6
            )


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_each_vector_is_judged_without_itself(distance: Any) -> None:
    vectors, classes = examples(13)
    classes[5] = 5  # alone in its class; class 4 has nobody
    found = scores_without_own(vectors, classes, 6, distance)
    for text in range(13):
        others = torch.arange(13) != text
        for number in range(6):
            members = vectors[others & (classes == number)]
            if not len(members):
                assert float(found[text, number]) == -torch.inf
                continue
            expected = prototype_scores(vectors[text : text + 1], members.mean(0, keepdim=True), distance)
            assert float(found[text, number]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_gradients_are_right() -> None:
    vectors, classes = examples(8)
    wide = vectors.double().requires_grad_()
    for distance in ("euclidean", "cosine"):
        assert torch.autograd.gradcheck(lambda one, kind=distance: scores_without_own(one, classes, 4, kind), (wide,))
