from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightllm.compression.masks import (
    Pattern,
    common_pattern,
    follows,
    layer_mask,
    network_masks,
    num_pruned,
    sparsity_of,
)


def pruned_by_sorting(scores: list[float], count: int) -> set[int]:
    """The places of the lowest scores, the first of equal ones: Python's sort is stable."""
    return set(sorted(range(len(scores)), key=lambda place: scores[place])[:count])


def places(mask: Tensor) -> set[int]:
    return set((~mask).flatten().nonzero().flatten().tolist())


@pytest.fixture(params=["distinct", "few values", "all equal"])
def scores(request: pytest.FixtureRequest) -> Tensor:
    if request.param == "distinct":
        return torch.randn(5, 12)
    return torch.randint(3, (5, 12)).float() if request.param == "few values" else torch.ones(5, 12)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.33, 0.5, 0.99, 1.0])
def test_exactly_the_lowest_of_layer_rows_and_network(scores: Tensor, sparsity: float) -> None:
    mask = layer_mask(scores, sparsity)
    assert places(mask) == pruned_by_sorting(scores.flatten().tolist(), round(sparsity * 60))
    for row, kept in zip(scores, layer_mask(scores, sparsity, per_row=True), strict=True):
        assert places(kept) == pruned_by_sorting(row.tolist(), round(sparsity * 12))
    other = scores.flip(0)[:3, :8]
    masks = network_masks({"a": scores, "b": other}, sparsity)
    assert list(masks) == ["a", "b"]
    together = [*scores.flatten().tolist(), *other.flatten().tolist()]
    flat = torch.cat([masks["a"].flatten(), masks["b"].flatten()])
    assert places(flat) == pruned_by_sorting(together, round(sparsity * 84))


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "1:2", "2:3"])
def test_pattern_keeps_the_best_of_every_group_along_the_input(text: str) -> None:
    pattern, scores = Pattern.parse(text), torch.rand(7, 24)
    mask = layer_mask(scores, pattern)
    assert follows(mask, pattern)
    assert sparsity_of(mask) == pytest.approx(pattern.sparsity)
    for row, begin in [(row, begin) for row in range(7) for begin in range(0, 24, pattern.group)]:
        group, kept = scores[row, begin : begin + pattern.group], mask[row, begin : begin + pattern.group]
        best = max(float(sum(group[list(some)])) for some in combinations(range(pattern.group), pattern.kept))
        assert float(group[kept].sum()) == pytest.approx(best)


def test_equal_scores_of_a_group_prune_its_first() -> None:
    assert layer_mask(torch.ones(1, 8), Pattern(2, 4)).tolist() == [[False, False, True, True] * 2]


def test_halves_are_rounded_to_the_even_number() -> None:
    assert [num_pruned(count, 0.5) for count in (3, 5, 7)] == [2, 2, 4]
    assert int((~layer_mask(torch.rand(1, 5), 0.5)).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_exactly(dtype: torch.dtype) -> None:
    scores = torch.randn(4, 16, dtype=dtype)
    assert places(layer_mask(scores, 0.5)) == pruned_by_sorting(scores.flatten().tolist(), 32)
    masks = network_masks({"a": scores[:2], "b": scores[2:]}, 0.5)
    assert torch.equal(torch.cat([*masks.values()]), layer_mask(scores, 0.5))
    close = torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert layer_mask(close, 0.5).tolist() == [[True, False]], "float64 is not rounded"


def test_infinite_scores_go_first_or_last() -> None:
    scores = torch.tensor([[1.0, float("inf"), -float("inf"), 0.5]])
    assert layer_mask(scores, 0.75).tolist() == [[False, True, False, False]]
    assert layer_mask(scores, 0.25).tolist() == [[True, True, False, True]]


def test_whether_a_matrix_follows_a_pattern() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    assert follows(weight, Pattern(2, 4))
    assert not follows(weight, Pattern(1, 4))
    assert not follows(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), Pattern(2, 4))
    assert not follows(torch.zeros(1, 6), Pattern(2, 4)), "its groups would not fill the row"
    assert not follows(torch.zeros(4), Pattern(2, 4))
    assert sparsity_of(weight) == 0.625
    assert sparsity_of(weight != 0) == 0.625


def test_the_pattern_that_masks_have_in_common() -> None:
    two_of_four = [layer_mask(torch.rand(6, 24), Pattern(2, 4)) for _ in range(3)]
    assert common_pattern(two_of_four) == Pattern(2, 4)
    assert common_pattern([layer_mask(torch.rand(6, 24), Pattern(4, 8))]) == Pattern(4, 8)
    assert common_pattern([*two_of_four, layer_mask(torch.rand(6, 24), Pattern(4, 8))]) == Pattern(4, 8)
    assert common_pattern([*two_of_four, layer_mask(torch.rand(6, 24), Pattern(1, 4))]) is None
    assert common_pattern([layer_mask(torch.rand(6, 24), 0.5)]) is None
    assert common_pattern([torch.ones(6, 24, dtype=torch.bool)]) is None
    assert common_pattern([]) is None


def test_refused() -> None:
    for text in ("4:2", "2:2", "0:4", "2", "2/4", "-1:4", ""):
        with pytest.raises(ValueError, match="'2:4' keeps 2 of every 4"):
            Pattern.parse(text)
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer_mask(torch.ones(2, 2), 1.5)
    with pytest.raises(ValueError, match="rows of a multiple of 4 weights"):
        layer_mask(torch.ones(2, 6), Pattern(2, 4))
    with pytest.raises(ValueError, match="1 of 4 scores are no numbers"):
        layer_mask(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 0.5)
    with pytest.raises(ValueError, match="hold NaN"):
        network_masks({"a": torch.tensor([[float("nan")]])}, 0.0)
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        layer_mask(torch.ones(4), 0.5)


def test_a_pattern_reads_as_it_is_written() -> None:
    assert str(Pattern.parse("2:4")) == "2:4"
    assert Pattern.parse("2:4").sparsity == 0.5
