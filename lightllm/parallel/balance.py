"""Where to cut a network into stages of equal cost: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_cut(costs: Sequence[float], num_stages: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Cut blocks into consecutive stages so that the dearest stage costs as little as possible.

    A pipeline runs at the pace of its dearest stage. Among cuts that are equal in that, the one whose costs differ
    least (by the sum of their squares) is taken.

    Args:
        costs: Of each block, in any unit.
        num_stages: How many stages; each gets a block at least.
        first: What the first stage does beside its blocks (the embedding).
        last: What the last stage does beside its blocks (the output head).

    Returns:
        How many blocks each stage has.

    Raises:
        ValueError: There are fewer blocks than stages.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{num_stages} stages cannot be cut from {len(costs)} blocks: each needs one at least")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def stage_cost(stage: int, begin: int, end: int) -> float:
        beside = (first if stage == 0 else 0.0) + (last if stage == num_stages - 1 else 0.0)
        return sums[end] - sums[begin] + beside

    # best[end]: the dearest stage's cost, the sum of squares and the cuts of the first blocks up to `end`.
    best = {end: (stage_cost(0, 0, end), stage_cost(0, 0, end) ** 2, [end]) for end in range(1, len(costs) + 1)}
    for stage in range(1, num_stages):
        following = {}
        for end in range(stage + 1, len(costs) + 1):
            candidates = []
            for begin in range(stage, end):
                dearest, squares, ends = best[begin]
                cost = stage_cost(stage, begin, end)
                candidates.append((max(dearest, cost), squares + cost**2, [*ends, end]))
            following[end] = min(candidates)
        best = following
    ends = best[len(costs)][2]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def check_cut(sizes: Sequence[int], num_blocks: int, num_stages: int) -> None:
    """Refuse a cut that is not one of this network into so many stages.

    Raises:
        ValueError: The sizes are not as many as the stages, one is below 1, or they do not add up to the blocks.
    """
    if len(sizes) != num_stages or min(sizes) < 1 or sum(sizes) != num_blocks:
        raise ValueError(
            f"cut is {list(sizes)}: give {num_stages} numbers of at least 1, a stage's blocks each, that add up to the "
            f"network's {num_blocks} blocks; or leave it to flops or parameters"
        )
