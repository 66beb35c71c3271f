"""Texts of a batch that belong together: an anchor, its positive, hard negatives, as `PairData` lays them in rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch


class TextGroups(NamedTuple):
    """What a batch says of its documents, in the order of their ids."""

    size: int
    """Documents that belong together: 1, a pair's 2, a triplet's 3, or more."""
    digests: Tensor
    """Equal for equal texts, and for others hardly ever, int64 `[documents]`."""
    levels: Tensor
    """How alike each group's first two are said to be, by rank, int64 `[groups]`; `IGNORE_INDEX` where nothing is."""


def text_groups(batch: TextBatch) -> TextGroups:
    """Read the groups of a batch: `n * g, …, n * g + n - 1` are the ids of a group of n documents.

    The only label of a group's first document is n, and that of its second one the level of their similarity, or 0.

    Raises:
        ValueError: The labels are no such ones, or a group is torn apart.
    """
    inside = batch["document_ids"] != PADDING_DOCUMENT
    labels, tokens = batch["labels"][inside], batch["input_ids"][inside]
    ids, index = batch["document_ids"][inside].unique(return_inverse=True)
    given = labels != IGNORE_INDEX
    of_document = torch.full_like(ids, IGNORE_INDEX).scatter(0, index[given], labels[given])
    size = int(of_document[0])
    whole = size > 0 and len(ids) % size == 0 and int(given.sum()) <= len(ids)
    if whole:
        first = ids[::size]
        members = first[:, None] + torch.arange(size, device=ids.device)
        whole = torch.equal(members.flatten(), ids) and bool((of_document[::size] == size).all())
    if not whole:
        raise ValueError(
            "the batch does not say which texts belong together: use PairData, or a datamodule that labels them alike"
        )
    levels = of_document[1::size] if size > 1 else torch.zeros_like(ids)
    levels = torch.where(levels > 0, levels, IGNORE_INDEX)
    # A sum over tokens, each mixed with its place; int64 wraps around.
    mixed = (tokens + 1) * 0x1E3779B97F4A7C15 + batch["position_ids"][inside] * 0x2545F4914F6CDD1D
    mixed = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) * -0x00AE502812AA7333
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    return TextGroups(size, torch.zeros_like(ids).index_add(0, index, mixed), levels)


def classes_of_texts(batch: TextBatch) -> Tensor:
    """The one label of each document, in the order of their ids, int64 `[documents]`; `IGNORE_INDEX` where none is.

    Raises:
        ValueError: A document has several labels, which are those of its tokens.
    """
    inside = batch["document_ids"] != PADDING_DOCUMENT
    labels = batch["labels"][inside]
    ids, index = batch["document_ids"][inside].unique(return_inverse=True)
    given = labels != IGNORE_INDEX
    if len(index[given].unique()) != int(given.sum()):
        raise ValueError("the documents have a label a token, and one a text is needed: use ClassificationData")
    return torch.full_like(ids, IGNORE_INDEX).scatter(0, index[given], labels[given])


def at_labels(log_probabilities: Tensor, batch: TextBatch) -> Tensor:
    """Log probabilities `[documents, classes]` of documents' labels, where those are, `[batch, seq]`."""
    classes = classes_of_texts(batch)
    chosen = log_probabilities.gather(1, classes.clamp(min=0)[:, None])[:, 0]
    ids = batch["document_ids"][batch["document_ids"] >= 0].unique()
    found = torch.zeros(batch["labels"].shape, dtype=chosen.dtype, device=chosen.device)
    given = batch["labels"] != IGNORE_INDEX
    found[given] = chosen[torch.searchsorted(ids, batch["document_ids"][given])]
    return found


def rows_by(batch: TextBatch, count: int) -> Iterator[TextBatch]:
    """The batch a few rows at a time, each part no wider than its documents are."""
    for begin in range(0, len(batch["input_ids"]), count):
        rows = slice(begin, begin + count)
        used = (batch["document_ids"][rows] != PADDING_DOCUMENT).any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 1
        yield TextBatch(
            input_ids=batch["input_ids"][rows, :width],
            labels=batch["labels"][rows, :width],
            position_ids=batch["position_ids"][rows, :width],
            document_ids=batch["document_ids"][rows, :width],
        )
