from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lightllm.datamodules.plan import Batches, BatchPlan, Plan, Rules, plan_epoch

Integers = NDArray[np.int64]

WAYS: list[dict[str, Any]] = [
    {"mode": "packed", "split": True},
    {"mode": "packed"},
    {"mode": "sorted"},
    {"mode": "sorted", "split": True},
    {"mode": "packed", "documents": 3},
    {"mode": "sorted", "documents": 3},
    {"mode": "packed", "documents": 3, "split": True},
    {"mode": "packed", "group": 2},
    {"mode": "sorted", "group": 2},
    {"mode": "packed", "documents": 3, "group": 2},
    {"mode": "sorted", "documents": 3, "group": 2},
]
"""Every way to make batches."""

ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))


def rules_of(way: dict[str, Any], **fields: Any) -> Rules:
    batches = Batches(mode=way["mode"], tokens=fields.pop("tokens", 128), documents=way.get("documents"))
    return Rules(batches, max_length=32, seed=fields.pop("seed", 5), split=way.get("split", False), **fields)


def example_lengths(way: dict[str, Any], count: int = 101, seed: int = 0) -> tuple[Integers, Integers]:
    group = way.get("group", 1)
    longest = 100 if way.get("split") else 32
    lengths = np.random.default_rng(seed).integers(1, longest + 1, (count, group))
    return 1000 + np.arange(count * group).reshape(count, group), lengths


def positions(plan: Plan) -> Counter[tuple[int, int]]:
    """How often each position of each document is planned."""
    return Counter(
        (int(document), position)
        for document, start, length in zip(plan.documents, plan.starts, plan.lengths, strict=True)
        for position in range(start, start + length)
    )


def all_positions(documents: Integers, lengths: Integers) -> set[tuple[int, int]]:
    pairs = zip(documents.ravel().tolist(), lengths.ravel().tolist(), strict=True)
    return {(document, position) for document, length in pairs for position in range(length)}


def batch_sets(plan: Plan) -> list[frozenset[int]]:
    return [frozenset(plan[index].documents.tolist()) for index in range(len(plan))]


@ways
@pytest.mark.parametrize("evaluation", [False, True])
def test_every_position_of_every_document_is_planned_once(way: dict[str, Any], evaluation: bool) -> None:
    documents, lengths = example_lengths(way)
    for epoch in range(3):
        plan = plan_epoch(documents, lengths, rules_of(way, evaluation=evaluation), epoch)
        counts = positions(plan)
        assert set(counts.values()) == {1}
        assert set(counts) == all_positions(documents, lengths)


@ways
def test_batches_keep_to_the_rules(way: dict[str, Any]) -> None:
    documents, lengths = example_lengths(way)
    group = way.get("group", 1)
    plan = plan_epoch(documents, lengths, rules_of(way), 0)
    for index in range(len(plan)):
        batch = plan[index]
        sums = np.add.reduceat(batch.lengths, batch.rows[:-1])
        width = batch.width or sums.max()
        assert sums.max() <= width
        assert batch.lengths.min() >= 1
        if way["mode"] == "sorted":
            assert (np.diff(batch.rows) == 1).all()
        if "documents" not in way:
            assert width * len(sums) <= 128
        elif way["mode"] == "packed":
            assert len(sums) == 1
        if "documents" in way and index < len(plan) - 1:
            assert len(batch.documents) == 3 * group
        pairs = Counter(((batch.documents - 1000) // group).tolist())
        if group > 1:
            assert set(pairs.values()) == {group}, "documents that belong together are in different batches"
            assert (batch.documents[::2] + 1 == batch.documents[1::2]).all()


@ways
def test_order_depends_on_seed_and_epoch_alone_and_their_number_on_neither_epoch(way: dict[str, Any]) -> None:
    documents, lengths = example_lengths(way)
    plans = [plan_epoch(documents, lengths, rules_of(way), epoch) for epoch in (0, 1, 2, 0)]
    assert len({len(plan) for plan in plans}) == 1
    first, second, _, again = map(batch_sets, plans)
    assert first == again
    assert first != second
    assert batch_sets(plan_epoch(documents, lengths, rules_of(way, seed=6), 0)) != first


@ways
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("count", [3, 7, 50, 101])
def test_ranks_get_as_many_batches_each_and_share_everything(
    way: dict[str, Any], evaluation: bool, num_ranks: int, count: int
) -> None:
    documents, lengths = example_lengths(way, count)
    lengths = np.maximum(lengths, 20)  # so that even few documents fill a row for each
    plan = plan_epoch(documents, lengths, rules_of(way, num_ranks=num_ranks, evaluation=evaluation), 0)
    assert len(plan) % num_ranks == 0
    counts = positions(plan)
    assert set(counts.values()) == {1}
    missing = {document for document, _ in all_positions(documents, lengths) - set(counts)}
    assert len(missing) < num_ranks * way.get("group", 1)
    assert not (missing and (evaluation or "documents" not in way))


@pytest.mark.parametrize("way", WAYS[:3])
def test_rows_as_large_as_a_batch_are_left_out_where_they_do_not_go_round(way: dict[str, Any]) -> None:
    documents, lengths = example_lengths(way, 9)
    lengths[:] = 32
    for evaluation in (False, True):
        plan = plan_epoch(documents, lengths, rules_of(way, tokens=32, num_ranks=2, evaluation=evaluation), 0)
        assert len(plan) == 8
        assert sum(positions(plan).values()) == (9 if evaluation else 8) * 32


def test_ranks_that_would_have_nothing_are_refused() -> None:
    documents, lengths = np.arange(2)[:, None], np.array([[5], [5]])
    for way in WAYS[:3]:
        with pytest.raises(ValueError, match="can't be shared among 3 processes"):
            plan_epoch(documents, lengths, rules_of(way, num_ranks=3), 0)


@pytest.mark.parametrize("mode", ["packed", "sorted"])
def test_each_optimizer_step_is_a_random_draw_distributed_by_length(mode: str) -> None:
    way = {"mode": mode, "documents": 4}
    documents, lengths = example_lengths(way, 96)
    rules = rules_of(way, accumulate=3, num_ranks=2)
    length_of = dict(zip(documents.ravel().tolist(), lengths.ravel().tolist(), strict=True))
    draws = []
    plan = plan_epoch(documents, lengths, rules, 0)
    for begin in range(0, len(plan), 6):
        batches = [plan[index].documents.tolist() for index in range(begin, begin + 6)]
        draws.append(sorted(document for batch in batches for document in batch))
        costs = [[length_of[document] for document in batch] for batch in batches]
        if mode == "sorted":
            assert all(min(one) >= max(next_) for one, next_ in pairwise(costs))
        else:
            sums = [sum(batch) for batch in costs]
            assert max(sums) - min(sums) <= 16
    assert len(draws) == 4
    # The draws are those of a permutation: which documents come together is not a matter of their length.
    expected = np.random.default_rng([5, 0]).permutation(96).reshape(4, 24)
    assert draws == [sorted((1000 + draw).tolist()) for draw in expected]


def test_sorted_batches_waste_little_and_packed_rows_next_to_nothing() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(3, 0.8, 3000).astype(np.int64) + 1, 128)[:, None]
    documents = np.arange(3000)[:, None]
    in_order = 1 - lengths.mean() / lengths.reshape(-1, 10).max(1).mean()
    for mode, most in (("sorted", 0.06), ("packed", 0.02)):
        rules = Rules(Batches(mode, tokens=1024), max_length=128, seed=0)  # type: ignore[arg-type]
        share = plan_epoch(documents, lengths, rules, 0).padding_share()
        assert 0 <= share < most < in_order
    rules = Rules(Batches(tokens=1024), max_length=128, seed=0, split=True)
    plan = plan_epoch(documents, lengths, rules, 0)
    assert plan.padding_share() * plan.lengths.sum() <= 128


@ways
def test_rows_are_drawn_until_they_hold_so_many_pieces(way: dict[str, Any]) -> None:
    documents, lengths = example_lengths(way)
    plan = plan_epoch(documents, lengths, rules_of(way, evaluation=True), 0)
    planned = [list(zip(row.documents, row.starts, row.lengths, strict=True)) for row in one_row_batches(plan)]
    for seed in (0, 1):
        drawn = plan.draw(20, seed)
        rows = [list(zip(row.documents, row.starts, row.lengths, strict=True)) for row in drawn]
        assert sum(map(len, rows)) == 20
        assert all(row in planned for row in rows[:-1])
        assert any(rows[-1] == row[: len(rows[-1])] for row in planned)
        assert all((row.rows.tolist(), row.width) == ([0, len(row.documents)], None) for row in drawn)
        assert str(plan.draw(20, seed)) == str(drawn)
    assert str(plan.draw(20, 0)) != str(plan.draw(20, 1))
    pieces = len(plan.documents)
    assert sum(len(row.documents) for row in plan.draw(10 * pieces, 0)) == pieces


def one_row_batches(plan: Plan) -> list[BatchPlan]:
    """Each row of a plan by itself."""
    return list(replace(plan, batches=np.arange(len(plan.rows))))  # type: ignore[arg-type]


def test_padding_share_counts_positions() -> None:
    documents, lengths = example_lengths({"mode": "sorted"})
    plan = plan_epoch(documents, lengths, rules_of({"mode": "sorted"}), 0)
    filled = total = 0
    for index in range(len(plan)):
        batch = plan[index]
        filled += int(batch.lengths.sum())
        total += int(batch.lengths.max()) * len(batch.lengths)
    assert plan.padding_share() == pytest.approx(1 - filled / total)


@pytest.mark.parametrize("way", [*WAYS[:3], {"mode": "sorted", "documents": 8}])
def test_a_million_documents_take_seconds(way: dict[str, Any]) -> None:
    lengths = np.random.default_rng(0).integers(1, 256, (1_000_000, 1))
    rules = replace(rules_of(way, tokens=16_384), max_length=256)
    begin = time.process_time()
    plan_epoch(np.arange(1_000_000)[:, None], lengths, rules, 0)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("batches", "per_example", "message"),
    [
        (Batches(tokens=31), 1, "batches.tokens is 31, but a row may take 32 positions .max_length is 32.: set"),
        (Batches("sorted", tokens=63), 2, "2 documents that belong together may take 64 positions"),
        (Batches(tokens=0), 1, "tokens is 0: it must be positive"),
        (Batches(documents=0), 1, "documents is 0: it must be positive"),
    ],
)
def test_rules_that_no_batch_can_follow_are_refused(batches: Batches, per_example: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules(batches, max_length=32, seed=0).check(per_example)


def test_fewest_tokens_and_a_number_of_documents_are_allowed() -> None:
    Rules(Batches(tokens=32), max_length=32, seed=0).check()
    Rules(Batches(tokens=1, documents=2), max_length=32, seed=0).check()
