"""Which examples go together: pure functions from lengths to an order and to the sizes of groups in it.

An example is what may not be torn apart: a document, or the two of a preference pair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def best_fit(lengths: Integers, capacity: int) -> tuple[Integers, Integers]:
    """Pack examples into rows by best fit, the longest first.

    Args:
        lengths: Positions of each example, none above `capacity`.
        capacity: Positions in a row.

    Returns:
        The examples in the order of the rows, and the number of examples in each row.
    """
    rows: list[list[int]] = []
    rows_with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where a row with s free positions exists: the best fit is the lowest bit that is enough
    order = np.argsort(-lengths, kind="stable")
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces ^= 1 << space
            rows[row].append(example)
        else:
            space, row = capacity, len(rows)
            rows.append([example])
        if space > length:
            rows_with_space[space - length].append(row)
            spaces |= 1 << (space - length)
    flat = [example for row in rows for example in row]
    return np.array(flat, dtype=np.int64), np.array([len(row) for row in rows], dtype=np.int64)


def cut_by_budget(costs: Integers, budget: int) -> Integers:
    """Cut a falling sequence into groups whose size times largest member is within a budget.

    Args:
        costs: Positions that each example would take alone, in falling order, none above `budget`.
        budget: Positions in a group when all its examples are as long as its longest.

    Returns:
        The sizes of the groups.
    """
    sizes, begin = [], 0
    while begin < len(costs):
        sizes.append(min(budget // int(costs[begin]), len(costs) - begin))
        begin += sizes[-1]
    return np.array(sizes, dtype=np.int64)


def even_sizes(count: int, num_groups: int) -> Integers:
    """Sizes of `num_groups` groups that share `count` examples as evenly as possible."""
    return np.diff(np.arange(num_groups + 1, dtype=np.int64) * count // max(num_groups, 1))


def sizes_in_rounds(count: int, size: int, num_ranks: int, leave_out: bool) -> Integers:
    """Sizes of groups of at most `size`, as many for every rank: full ones, then even ones that share the rest.

    Args:
        count: Members to share out.
        size: Members in a full group.
        num_ranks: The number of groups is a multiple of it.
        leave_out: Where groups have one member and the number does not go round, leave the last few out; otherwise
            the last groups are larger.

    Raises:
        ValueError: `count` is less than `num_ranks`.
    """
    require_one_each(count, num_ranks)
    full = count // size // num_ranks * num_ranks
    rest = count - full * size
    if rest < num_ranks and size == 1 and leave_out:
        rest = 0
    elif 0 < rest < num_ranks:
        full, rest = full - num_ranks, rest + num_ranks * size
    num_rest = min(-(-rest // (size * num_ranks)), rest // num_ranks) * num_ranks
    return np.concatenate([np.full(full, size, dtype=np.int64), even_sizes(rest, num_rest)])


def split_until_even(sizes: Integers, num_ranks: int, leave_out: bool) -> Integers:
    """Halve the largest groups until there are as many for every rank.

    Args:
        sizes: Sizes of the groups.
        num_ranks: The number of groups becomes a multiple of it.
        leave_out: See `sizes_in_rounds`.

    Raises:
        ValueError: There are fewer members than ranks.
    """
    require_one_each(int(sizes.sum()), num_ranks)
    groups = sizes.tolist()
    while len(groups) % num_ranks:
        largest = max(range(len(groups)), key=groups.__getitem__)
        if groups[largest] == 1:
            return sizes_in_rounds(len(groups), 1, num_ranks, leave_out)
        half = groups[largest] // 2
        groups[largest : largest + 1] = [groups[largest] - half, half]
    return np.array(groups, dtype=np.int64)


def require_one_each(count: int, num_ranks: int) -> None:
    """Refuse to share out fewer examples or rows than there are ranks.

    Raises:
        ValueError: `count` is less than `num_ranks`.
    """
    if count < num_ranks:
        raise ValueError(f"{count} examples or packed rows can't be shared among {num_ranks} processes: use fewer")


def deal(num_examples: int, num_groups: int) -> tuple[Integers, Integers]:
    """Deal examples that stand in falling order to groups, back and forth, so that the groups' sums come out close.

    Returns:
        The examples in the order of the groups, and the groups' sizes, which differ by one at most.
    """
    turn, place = np.divmod(np.arange(num_examples), num_groups)
    group = np.where(turn % 2 == 0, place, num_groups - 1 - place)
    return np.argsort(group, kind="stable"), np.bincount(group, minlength=num_groups).astype(np.int64)
