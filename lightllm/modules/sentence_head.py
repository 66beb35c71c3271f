"""A second head beside that of masked tokens: does the second of two texts follow the first?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch


class SentenceHead(nn.Module):
    """Two classes from a document's first token, as BERT has it (arXiv:1810.04805): a layer, a tanh, a matrix.

    Args:
        width: Of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.classes = nn.Linear(width, 2)

    @override
    def forward(self, first: Tensor) -> Tensor:
        """Logits `[documents, 2]` of first tokens' hidden states `[documents, hidden]`."""
        logits: Tensor = self.classes(torch.tanh(self.dense(first)))
        return logits


def document_numbers(batch: TextBatch) -> Tensor:
    """The documents of a batch counted through, row after row, int64 `[batch, seq]`.

    Padding goes with the document before it, or is one more.
    """
    begins = batch["position_ids"] == 0
    return (begins.flatten().cumsum(0) - 1).view_as(begins)


def document_labels(batch: TextBatch) -> Tensor:
    """The one label of each document of `document_numbers`, int64 `[documents]`; `IGNORE_INDEX` where it has none.

    Raises:
        ValueError: A document has several labels, so that they are those of its tokens.
    """
    numbers, labels = document_numbers(batch), batch["labels"]
    given = labels != IGNORE_INDEX
    found = torch.full((int(numbers[-1, -1]) + 1,), IGNORE_INDEX, dtype=torch.int64, device=labels.device)
    if len(numbers[given].unique()) != int(given.sum()):
        raise ValueError(
            "sentence_loss needs one label a document, and these have one a token: use SentencePairData, or set "
            "sentence_loss to 0"
        )
    found[numbers[given]] = labels[given]
    return found


def token_types(batch: TextBatch, separator: int | None) -> Tensor | None:
    """0 up to a document's first separator, that one included, and 1 behind it; int64 `[batch, seq]`.

    Args:
        batch: Rows of documents.
        separator: The token between two texts; without one, None is returned.
    """
    if separator is None:
        return None
    separators = batch["input_ids"] == separator
    before = separators.cumsum(1) - separators.long()
    at_begin = torch.where(batch["position_ids"] == 0, before, 0).cummax(1).values
    return (before > at_begin).long()
