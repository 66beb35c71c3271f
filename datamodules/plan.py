"""Plans: which positions of which documents make up every batch of an epoch.

A plan is a pure function of the documents' lengths, the rules, and the epoch. It holds the batches of all ranks, so
that each rank has as many as the others: rank r of R takes the batches r, r + R, r + 2R, …
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from lightllm.datamodules.arrangement import (
    Integers,
    best_fit,
    cut_by_budget,
    deal,
    even_sizes,
    require_one_each,
    sizes_in_rounds,
    split_until_even,
)

WINDOW = 4096
"""Shuffled examples among which those of similar length (sorted), or that fill a row (packed), are looked for."""


@dataclass(frozen=True)
class Batches:
    """How documents become batches."""

    mode: Literal["packed", "sorted"] = "packed"
    """packed: rows of exactly `max_length` positions that hold several documents, which can't see each other;
    sorted: one document a row, rows of similar length together, padded to the longest."""
    tokens: int = 8192
    """Positions in a batch at most, padding included."""
    documents: int | None = None
    """So many documents in every batch, instead of a budget of tokens (a preference pair counts as one). Every
    optimizer step sees a random draw of documents * accumulate_grad_batches; within it, documents of similar length
    share a batch (sorted), or the batches, each one row, come out equally long (packed)."""


@dataclass(frozen=True)
class Rules:
    """What a plan depends on beside the documents."""

    batches: Batches
    max_length: int
    """Positions in a row at most; a row of several documents that belong together may have as many for each."""
    seed: int
    split: bool = False
    """Longer documents are cut into consecutive pieces; otherwise they come truncated."""
    num_ranks: int = 1
    accumulate: int = 1
    """Batches of an optimizer step, on each rank."""
    evaluation: bool = False
    """No example is left out; with several ranks, training may leave out as many as do not go round."""

    def check(self, documents_per_example: int = 1) -> None:
        """Refuse rules that no plan can follow.

        Raises:
            ValueError: A number is not positive, or one example may be larger than a batch.
        """
        tokens, documents = self.batches.tokens, self.batches.documents
        for name, value in (("tokens", tokens), ("documents", documents), ("max_length", self.max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be positive")
        if documents is not None:
            return
        largest = self.max_length * documents_per_example
        if tokens < largest:
            example = (
                "a row" if documents_per_example == 1 else f"{documents_per_example} documents that belong together"
            )
            raise ValueError(
                f"batches.tokens is {tokens}, but {example} may take {largest} positions (max_length is "
                f"{self.max_length}): set batches.tokens to at least {largest}, or lower max_length"
            )


class BatchPlan(NamedTuple):
    """One batch, as pieces of documents."""

    documents: Integers
    """Document of each piece."""
    starts: Integers
    """First position of each piece in its document."""
    lengths: Integers
    """Positions in each piece."""
    rows: Integers
    """`num_rows + 1` offsets into the pieces."""
    width: int | None
    """Positions in a row; those of the longest row when None."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The batches of an epoch, of all ranks; a sequence of `BatchPlan`."""

    documents: Integers
    starts: Integers
    lengths: Integers
    rows: Integers
    batches: Integers
    """`num_batches + 1` offsets into the rows."""
    width: int | None

    def __len__(self) -> int:
        return len(self.batches) - 1

    def __getitem__(self, index: int) -> BatchPlan:
        rows = self.rows[self.batches[index] : self.batches[index + 1] + 1]
        pieces = slice(rows[0], rows[-1])
        return BatchPlan(self.documents[pieces], self.starts[pieces], self.lengths[pieces], rows - rows[0], self.width)

    def padding_share(self) -> float:
        """Share of the epoch's positions that hold padding."""
        filled = np.add.reduceat(self.lengths, self.rows[:-1])
        widths = np.maximum.reduceat(filled, self.batches[:-1]) if self.width is None else self.width
        return 1 - float(filled.sum() / (widths * np.diff(self.batches)).sum())

    def draw(self, num_pieces: int, seed: int) -> list[BatchPlan]:
        """Draw rows at random until they hold so many pieces, of which the last row has no more than are missing.

        Returns:
            A batch for each row, as wide as it is full; fewer pieces where the plan has no more.
        """
        drawn = []
        for row in np.random.default_rng(seed).permutation(len(self.rows) - 1):
            pieces = slice(self.rows[row], min(self.rows[row + 1], self.rows[row] + num_pieces))
            size = pieces.stop - pieces.start
            if not size:
                break
            offsets = np.array([0, size])
            drawn.append(BatchPlan(self.documents[pieces], self.starts[pieces], self.lengths[pieces], offsets, None))
            num_pieces -= size
        return drawn


def plan_epoch(documents: Integers, lengths: Integers, rules: Rules, epoch: int) -> Plan:
    """Plan an epoch; a million documents take a few seconds.

    Args:
        documents: Indices of the documents, `[num_examples, documents_per_example]`; an example's documents stay in
            one batch, side by side.
        lengths: Positions that each fills, of the same shape; at most `rules.max_length` unless they are to be split.
        rules: How batches are made.
        epoch: The order is that of seed and epoch.

    Raises:
        ValueError: There are fewer examples or packed rows than ranks.
    """
    rng = np.random.default_rng([rules.seed, epoch])
    # What goes together stays together where the number of batches depends on it: all epochs must have as many.
    always = np.random.default_rng(rules.seed)
    starts = np.zeros_like(documents)
    if rules.split and rules.batches.mode == "packed" and rules.batches.documents is None:
        return _fill_rows(documents[:, 0], lengths[:, 0], rules, rng)
    if rules.split:
        documents, starts, lengths = _split_documents(documents[:, 0], lengths[:, 0], rules.max_length)
    width = None
    if rules.batches.documents is not None:
        order, batches = _draw_documents(
            lengths.max(1) if rules.batches.mode == "sorted" else lengths.sum(1), rules, rng
        )
        rows, batches = (batches, np.ones_like(batches)) if rules.batches.mode == "packed" else (None, batches)
    elif rules.batches.mode == "packed":
        width = rules.max_length * lengths.shape[1]
        order, rows = _shuffle_groups(*_pack_rows(lengths.sum(1), width, always), rng)
        batches = sizes_in_rounds(len(rows), rules.batches.tokens // width, rules.num_ranks, not rules.evaluation)
    else:
        order, batches = _group_by_length(lengths.max(1) * lengths.shape[1], rules, always, rng)
        rows = None
    if rows is None:  # every document has its own
        rows, batches = np.ones(lengths.size, dtype=np.int64), batches * lengths.shape[1]
    else:
        rows = rows * lengths.shape[1]
    rows = rows[: batches.sum()]
    order = order[: rows.sum() // lengths.shape[1]]
    documents, starts, lengths = (array[order].ravel() for array in (documents, starts, lengths))
    return Plan(documents, starts, lengths, _offsets(rows), _offsets(batches), width)


def _fill_rows(documents: Integers, lengths: Integers, rules: Rules, rng: np.random.Generator) -> Plan:
    """Lay shuffled documents end to end and cut the whole into rows: no padding but in the last row."""
    order = rng.permutation(len(documents))
    ends = np.cumsum(lengths[order])
    cuts = np.sort(np.concatenate([np.arange(0, ends[-1], rules.max_length), ends]), kind="stable")
    cuts = cuts[np.append(True, np.diff(cuts) > 0)]
    begins = cuts[:-1]
    place = np.searchsorted(ends, begins, side="right")
    starts = begins - (ends - lengths[order])[place]
    (first_in_row,) = np.nonzero(begins % rules.max_length == 0)
    sizes = sizes_in_rounds(
        len(first_in_row), rules.batches.tokens // rules.max_length, rules.num_ranks, not rules.evaluation
    )
    batches = _offsets(sizes)
    rows = np.append(first_in_row, len(begins))[: batches[-1] + 1]
    pieces = slice(rows[-1])
    return Plan(documents[order][place][pieces], starts[pieces], np.diff(cuts)[pieces], rows, batches, rules.max_length)


def _split_documents(documents: Integers, lengths: Integers, max_length: int) -> tuple[Integers, Integers, Integers]:
    """Cut documents into pieces of at most `max_length`; returns documents, starts and lengths, `[num_pieces, 1]`."""
    num_pieces = -(-lengths // max_length)
    place = np.repeat(np.arange(len(documents)), num_pieces)
    starts = (np.arange(len(place)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)) * max_length
    sizes = np.minimum(lengths[place] - starts, max_length)
    return documents[place][:, None], starts[:, None], sizes[:, None]


def _pack_rows(sizes: Integers, width: int, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """Best fit within windows of shuffled examples: the order, and the number of examples in each row."""
    order = rng.permutation(len(sizes))
    packed = []
    for begin in range(0, len(order), WINDOW):
        window = order[begin : begin + WINDOW]
        in_window, rows = best_fit(sizes[window], width)
        packed.append((window[in_window], rows))
    flat, rows = (np.concatenate(parts) for parts in zip(*packed, strict=True))
    return flat, rows


def _group_by_length(
    costs: Integers, rules: Rules, always: np.random.Generator, rng: np.random.Generator
) -> tuple[Integers, Integers]:
    """Batches of similar examples within windows of shuffled ones, then the batches shuffled."""
    order = always.permutation(len(costs))
    order = order[np.lexsort((-costs[order], np.arange(len(order)) // WINDOW))]
    windows = [costs[order[begin : begin + WINDOW]] for begin in range(0, len(order), WINDOW)]
    sizes = np.concatenate([cut_by_budget(window, rules.batches.tokens) for window in windows])
    sizes = split_until_even(sizes, rules.num_ranks, not rules.evaluation)
    # Neighbours stay together, so that at each step the ranks have rows of similar length.
    rounds = np.full(len(sizes) // rules.num_ranks, rules.num_ranks)
    shuffled, _ = _shuffle_groups(np.arange(len(sizes)), rounds, rng)
    position = np.empty_like(shuffled)
    position[shuffled] = np.arange(len(shuffled))
    order = order[: sizes.sum()][np.argsort(np.repeat(position, sizes), kind="stable")]
    return order, sizes[shuffled]


def _draw_documents(costs: Integers, rules: Rules, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """Draw the examples of each optimizer step at random, and distribute them over its batches by length."""
    require_one_each(len(costs), rules.num_ranks)
    assert rules.batches.documents is not None
    order = rng.permutation(len(costs))
    per_step = len(order) if rules.evaluation else rules.batches.documents * rules.accumulate * rules.num_ranks
    flat, sizes = [], []
    for begin in range(0, len(order), per_step):
        drawn = order[begin : begin + per_step]
        rounds = -(-len(drawn) // (rules.batches.documents * rules.num_ranks))
        if rounds * rules.num_ranks > len(drawn):  # the last few do not go round
            rounds = len(drawn) // rules.num_ranks
            drawn = drawn if rules.evaluation else drawn[: rounds * rules.num_ranks]
        if not len(drawn):
            continue
        drawn = drawn[np.argsort(-costs[drawn], kind="stable")]
        num_batches = rounds * rules.num_ranks
        if rules.batches.mode == "packed":
            dealt, counts = deal(len(drawn), num_batches)
            drawn = drawn[dealt]
        else:
            counts = even_sizes(len(drawn), num_batches)
        flat.append(drawn)
        sizes.append(counts)
    return np.concatenate(flat), np.concatenate(sizes)


def _shuffle_groups(members: Integers, sizes: Integers, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """Permute groups of consecutive members as wholes."""
    new_order = rng.permutation(len(sizes))
    rank_of_group = np.empty_like(new_order)
    rank_of_group[new_order] = np.arange(len(sizes))
    return members[np.argsort(np.repeat(rank_of_group, sizes), kind="stable")], sizes[new_order]


def _offsets(sizes: Integers) -> Integers:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
