from __future__ import annotations

import numpy as np
import pytest

from lightllm.datamodules.arrangement import (
    best_fit,
    cut_by_budget,
    deal,
    even_sizes,
    require_one_each,
    sizes_in_rounds,
    split_until_even,
)


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same by looking through all rows."""
    rows: list[list[int]] = []
    spaces: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [row for row in range(len(rows)) if spaces[row] >= lengths[example]]
        if fitting:
            row = min(fitting, key=lambda index: spaces[index])
        else:
            row = len(rows)
            rows.append([])
            spaces.append(capacity)
        rows[row].append(example)
        spaces[row] -= lengths[example]
    return rows


@pytest.mark.parametrize("capacity", [7, 64, 100])
def test_best_fit_packs_as_well_as_the_plain_algorithm(capacity: int) -> None:
    lengths = np.random.default_rng(0).integers(1, capacity + 1, 300)
    order, sizes = best_fit(lengths, capacity)
    assert sorted(order.tolist()) == list(range(300))
    rows = np.split(order, np.cumsum(sizes)[:-1])
    assert max(int(lengths[row].sum()) for row in rows) <= capacity
    slow = slow_best_fit(lengths.tolist(), capacity)
    fast_sums = sorted(int(lengths[row].sum()) for row in rows)
    assert fast_sums == sorted(sum(int(lengths[example]) for example in row) for row in slow)


def test_cut_by_budget_takes_as_many_as_fit_at_the_longest() -> None:
    assert cut_by_budget(np.array([10, 9, 5, 5, 5, 2, 2]), 20).tolist() == [2, 4, 1]


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("leave_out", [True, False])
def test_sizes_in_rounds_go_round_and_lose_nothing(size: int, ranks: int, leave_out: bool) -> None:
    for count in range(ranks, 40):
        sizes = sizes_in_rounds(count, size, ranks, leave_out)
        assert len(sizes) % ranks == 0
        assert sizes.min() >= 1
        left_out = count % ranks if size == 1 and leave_out else 0
        assert sizes.sum() == count - left_out
        assert sizes.max() <= size or (size == 1 and not leave_out)
        if ranks == 1:
            assert sizes.tolist() == [size] * (count // size) + [count % size] * (count % size > 0)
    with pytest.raises(ValueError, match="can't be shared"):
        sizes_in_rounds(ranks - 1, size, ranks, leave_out)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("leave_out", [True, False])
def test_split_until_even_halves_the_largest(ranks: int, leave_out: bool) -> None:
    sizes = split_until_even(np.array([5, 8, 1]), ranks, leave_out)
    assert len(sizes) % ranks == 0
    assert sizes.sum() == 14
    ones = split_until_even(np.ones(7, dtype=np.int64), ranks, leave_out)
    assert len(ones) % ranks == 0
    assert ones.sum() == (7 - 7 % ranks if leave_out else 7)


def test_even_sizes_differ_by_one_at_most() -> None:
    assert even_sizes(10, 4).tolist() == [2, 3, 2, 3]
    assert even_sizes(0, 0).tolist() == []


def test_deal_balances_sums() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(1, 500, 64))[::-1]
    order, sizes = deal(64, 8)
    assert sizes.tolist() == [8] * 8
    sums = lengths[order].reshape(8, 8).sum(1)
    in_order = lengths.reshape(8, 8).sum(1)
    assert np.ptp(sums) < 0.15 * np.ptp(in_order)
    order, sizes = deal(10, 4)
    assert sorted(order.tolist()) == list(range(10))
    assert sorted(sizes.tolist()) == [2, 2, 3, 3]


def test_fewer_examples_than_ranks_are_refused() -> None:
    require_one_each(2, 2)
    with pytest.raises(ValueError, match="1 examples or packed rows can't be shared among 2 processes"):
        require_one_each(1, 2)
