from __future__ import annotations

from itertools import combinations

import pytest
import torch

from lightllm.parallel.balance import balanced_cut, check_cut


def dearest(costs: list[float], sizes: list[int], first: float, last: float) -> float:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    stages = [sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    stages[0] += first
    stages[-1] += last
    return max(stages)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 9])
def test_no_other_cut_has_a_cheaper_dearest_stage(num_stages: int) -> None:
    costs = torch.rand(9, generator=torch.Generator().manual_seed(num_stages)).tolist()
    sizes = balanced_cut(costs, num_stages, first=0.3, last=1.1)
    assert len(sizes) == num_stages
    assert sum(sizes) == 9
    best = min(
        dearest(costs, [end - begin for begin, end in zip((0, *ends), (*ends, 9), strict=True)], 0.3, 1.1)
        for ends in combinations(range(1, 9), num_stages - 1)
    )
    assert dearest(costs, sizes, 0.3, 1.1) == pytest.approx(best)


def test_equal_blocks_are_shared_out_evenly_and_a_head_counts_as_its_cost() -> None:
    assert balanced_cut([1.0] * 8, 4) == [2, 2, 2, 2]
    assert balanced_cut([1.0] * 8, 2, last=2.0) == [5, 3]
    assert balanced_cut([1.0] * 8, 2, first=2.0) == [3, 5]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="3 stages cannot be cut from 2 blocks"):
        balanced_cut([1.0, 1.0], 3)
    check_cut([1, 3], 4, 2)
    for sizes in ([1, 2], [4], [0, 4], [5, -1]):
        with pytest.raises(ValueError, match=r"give 2 numbers of at least 1.*4 blocks"):
            check_cut(sizes, 4, 2)
