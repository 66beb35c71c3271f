"""The documents of a split: those of a token store that can be learned from within the length of a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightllm.batch import Document
from lightllm.datamodules.arrangement import Integers
from lightllm.datamodules.rows import Origin
from lightllm.datamodules.token_store import NO_TARGET, TokenStore


@dataclass(frozen=True, eq=False)
class DocumentSet:
    """Documents of a store, as they are batched.

    `documents[i]` is the document with the id i that batches carry; ids are those of the store, so that not all of
    them need be here.
    """

    store: TokenStore
    examples: Integers
    """Ids, `[num_examples, documents_per_row]`: documents of one row of the source, which stay in one batch."""
    lengths: Integers
    """Positions that each fills, of the same shape."""
    num_truncated: int
    """Documents of which the end was cut off."""
    num_dropped: int
    """Documents that are left out, because no target is left in them or in one that belongs to them."""

    def __len__(self) -> int:
        return self.examples.size

    def __getitem__(self, document_id: int) -> Document:
        return self.store.piece(document_id)

    @property
    def num_positions(self) -> int:
        """Positions that all of them fill together: tokens, less one a document."""
        return int(self.lengths.sum())

    def origin(self, document_id: int) -> Origin:
        """Where a document comes from."""
        return self.store.origin(document_id)

    def spread(self, num_documents: int) -> DocumentSet:
        """At most so many of the documents, evenly spaced; those of a row stay together, and one row is the least."""
        num_rows, per_row = self.examples.shape
        num_chosen = min(num_rows, max(1, num_documents // per_row))
        chosen = np.arange(num_chosen) * num_rows // num_chosen
        return replace(self, examples=self.examples[chosen], lengths=self.lengths[chosen])


def select_documents(
    store: TokenStore,
    rows: Integers,
    documents_per_row: int,
    max_length: int,
    overflow: Literal["split", "truncate"],
) -> DocumentSet:
    """Select the documents that fit, or are made to fit, in rows.

    Args:
        store: All documents.
        rows: Indices of the (good) rows to take.
        documents_per_row: Documents of each row.
        max_length: Positions in a row.
        overflow: See `DocumentData.overflow`.
    """
    examples = rows[:, None] * documents_per_row + np.arange(documents_per_row)
    positions = np.maximum(store.encoded.lengths[examples] - 1, 0)
    first_targets = store.encoded.targets_from[examples]
    if overflow == "split":
        usable, lengths = first_targets != NO_TARGET, positions
    else:
        usable, lengths = first_targets <= max_length, np.minimum(positions, max_length)
    kept = usable.all(axis=1)
    return DocumentSet(
        store=store,
        examples=examples[kept],
        lengths=lengths[kept],
        num_truncated=int((lengths < positions)[kept].sum()),
        num_dropped=int((~kept).sum()) * documents_per_row,
    )


def choose_rows(split: str, origins: Integers, held_out: float) -> Integers:
    """Indices of a split's rows: all, or, if some are held out for validation, its part of them.

    Which rows are held out depends on nothing but how many there are, so that runs with different seeds compare. Rows
    that were made of one row of the source are held out together.

    Args:
        split: "train", "val" or "test".
        origins: Source and line of each row, `[num_rows, 2]`.
        held_out: Share of the rows that is held out, at least one row but never all; 0 if none is.
    """
    if not held_out:
        return np.arange(len(origins))
    begins = (origins[1:] != origins[:-1]).any(axis=1)
    of_source = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(begins)])[: len(origins)]
    num_rows = len(origins) and int(of_source[-1]) + 1
    num_held_out = max(0, min(max(1, round(held_out * num_rows)), num_rows - 1))
    order = np.random.default_rng(0).permutation(num_rows)
    chosen = order[:num_held_out] if split == "val" else order[num_held_out:]
    return np.flatnonzero(np.isin(of_source, chosen))
