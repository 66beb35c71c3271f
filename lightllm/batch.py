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
    """One tokenised document, before batches are made of it.

    A document of n tokens fills n - 1 positions of a row: nothing is predicted from its last token.
    """

    input_ids: Sequence[int] | Tensor
    """The n token ids, with whatever special tokens the document has."""
    targets: Sequence[bool] | Tensor
    """n flags: is token t to be predicted (from the tokens before it)? The first one's flag has no effect."""
    document_id: int = PADDING_DOCUMENT
    """Index in the dataset; set by the data engine, not by encoders."""
