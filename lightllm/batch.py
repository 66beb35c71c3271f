"""The batch schema: what every datamodule makes and every objective reads.

A row of a batch holds one document or several, packed. Documents are told apart by positions that restart at 0;
no attention mask is ever passed, because transformers builds the block-diagonal causal mask from restarting
positions, and a row whose positions just count up takes the fast causal kernel.

Labels are aligned with the position that predicts them: `labels[b, t]` is the token to predict *from*
`input_ids[b, :t + 1]`, so no objective shifts, and no label crosses a document's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that is not a target."""

PADDING_DOCUMENT = -1
"""The document id of padding."""


class TextBatch(TypedDict):
    """One batch of token rows; every tensor is int64 and `[batch, seq]`."""

    input_ids: Tensor
    """Token ids; padding holds any valid id."""
    labels: Tensor
    """The token to predict at each position, `IGNORE_INDEX` where there is none."""
    position_ids: Tensor
    """Position within the document: 0, 1, 2, … and again 0 where the next document begins."""
    document_ids: Tensor
    """Index of the document in its dataset, `PADDING_DOCUMENT` on padding."""


class Document(NamedTuple):
    """One tokenised document, or a piece of one, before batches are made of it.

    A document of n tokens fills n - 1 positions of a row: nothing is predicted from its last token.
    """

    input_ids: Sequence[int] | Tensor
    """The n token ids, with whatever special tokens the document has."""
    targets: Sequence[bool] | Tensor
    """n flags: is token t to be predicted (from the tokens before it)? The first one's flag has no effect."""
    document_id: int = PADDING_DOCUMENT
    """Index in the dataset; set by the data engine, not by encoders."""


def pack_documents(rows: Sequence[Sequence[Document]], length: int | None = None, padding_token: int = 0) -> TextBatch:
    """Lay documents end to end in rows; they can't see each other, because positions restart with each.

    What is left of a row is padding, which nothing is learned from. Behind several documents it counts from 0 like
    one more document; behind a single one it counts on, so that a row of one document needs no mask at all.

    Args:
        rows: The documents of each row.
        length: Positions in a row; the longest row's when None.
        padding_token: The token id on padding.

    Returns:
        A batch of `[len(rows), length]`.

    Raises:
        ValueError: No rows, a document of fewer than two tokens, or a row that does not fit in `length`.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    filled = [sum(len(document.input_ids) - 1 for document in row) for row in rows]
    width = max(filled) if length is None else length
    if max(filled) > width:
        raise ValueError(f"a row of {max(filled)} positions does not fit in {width}")
    shape = (len(rows), width)
    input_ids = torch.full(shape, padding_token, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    document_ids = torch.full(shape, PADDING_DOCUMENT, dtype=torch.int64)
    positions = torch.arange(width)
    position_ids = positions.repeat(len(rows), 1)
    for index, row in enumerate(rows):
        begin = 0
        for document in row:
            tokens = torch.as_tensor(document.input_ids, dtype=torch.int64)
            targets = torch.as_tensor(document.targets, dtype=torch.bool)
            if len(tokens) < 2:
                raise ValueError(f"document {document.document_id} has {len(tokens)} tokens: nothing to predict in it")
            end = begin + len(tokens) - 1
            input_ids[index, begin:end] = tokens[:-1]
            labels[index, begin:end] = torch.where(targets[1:], tokens[1:], IGNORE_INDEX)
            document_ids[index, begin:end] = document.document_id
            position_ids[index, begin:] = positions[: width - begin]
            begin = end
        if len(row) > 1:
            position_ids[index, begin:] = positions[: width - begin]
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "document_ids": document_ids}


def pad_documents(documents: Sequence[Document], length: int | None = None, padding_token: int = 0) -> TextBatch:
    """One document a row, padded on the right to `length`, or to the longest.

    Raises:
        ValueError: See `pack_documents`.
    """
    return pack_documents([[document] for document in documents], length, padding_token)


def batch_to(batch: TextBatch, device: torch.device) -> TextBatch:
    """The batch on a device."""
    return TextBatch(
        input_ids=batch["input_ids"].to(device),
        labels=batch["labels"].to(device),
        position_ids=batch["position_ids"].to(device),
        document_ids=batch["document_ids"].to(device),
    )


def padding_share(batch: TextBatch) -> float:
    """Share of the batch's positions that hold padding, between 0 and 1."""
    return float((batch["document_ids"] == PADDING_DOCUMENT).float().mean())
