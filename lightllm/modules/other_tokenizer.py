"""A batch's text in the tokens of another tokenizer, target by target beside its own (ULD, arXiv:2402.12030).

The i-th target token of a document is compared with the i-th target token of the same text in the other tokenizer's
tokens, as far as the shorter of the two goes: they need not stand for the same characters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, Document, TextBatch, batch_to, pack_documents


class Retokenized(NamedTuple):
    """The same documents twice, with as many targets of each."""

    batch: TextBatch
    """In the other tokenizer's tokens; its targets are those that are compared."""
    labels: Tensor
    """Of the original batch, `[batch, seq]`, with the targets that are compared and no others."""


class Counterpart(NamedTuple):
    """What a teacher with another tokenizer knows of a batch."""

    hidden: Tensor
    """Its hidden states before its targets that are compared, `[targets, teacher's hidden]`."""
    labels: Tensor
    """See `Retokenized`."""


class OtherTokenizer:
    """Translates batches from one tokenizer to another.

    Text goes over piece by piece: what is to be learned and what is not begin tokens of their own. Special tokens go
    over as the other tokenizer's of the same text, the end token as its end token; others are dropped, as no text says
    them.

    Args:
        ours: The data's tokenizer.
        theirs: The other.
        max_length: Positions that its network has, or None.
    """

    def __init__(
        self, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> None:
        self.ours = ours
        self.theirs = theirs
        self.max_length = max_length
        start = theirs.bos_token_id
        self._start = [start] if start is not None and start in theirs("").input_ids else []
        self._special = {index: self._translated(index) for index in ours.all_special_ids}

    def _translated(self, special: int) -> list[int]:
        text = self.ours.convert_ids_to_tokens(special)
        assert isinstance(text, str)
        if special == self.ours.bos_token_id and special != self.ours.eos_token_id:
            return []  # theirs is put before every document
        known = self.theirs.get_vocab().get(text)
        if known is not None and known in self.theirs.all_special_ids:
            return [known]
        end = self.theirs.eos_token_id
        return [end] if special == self.ours.eos_token_id and end is not None else []

    def __call__(self, batch: TextBatch) -> Retokenized:
        """A batch in the other tokenizer's tokens; rows hold the same documents in the same order."""
        labels = torch.full_like(batch["labels"], IGNORE_INDEX)
        rows: list[list[Document]] = [[] for _ in range(len(labels))]
        for row, begin, end in _documents(batch):
            document = self._document(batch, row, begin, end)
            targets = (batch["labels"][row, begin:end] != IGNORE_INDEX).nonzero().squeeze(1) + begin
            theirs = torch.as_tensor(document.targets).nonzero().squeeze(1)
            count = min(len(targets), len(theirs))
            if not count:
                continue
            labels[row, targets[:count]] = batch["labels"][row, targets[:count]]
            flags = torch.zeros(len(document.targets), dtype=torch.bool)
            flags[theirs[:count]] = True
            rows[row].append(document._replace(targets=flags))
        filled = [row for row in rows if row]
        made = pack_documents(filled or [[Document([0, 0], [False, False])]])
        return Retokenized(batch_to(made, labels.device), labels)

    def _document(self, batch: TextBatch, row: int, begin: int, end: int) -> Document:
        """A document's text in their tokens, cut to the positions that there are; its first token is no target."""
        ids, flags = batch["input_ids"][row, begin:end].tolist(), [False]
        labels = batch["labels"][row, begin:end].tolist()
        flags += [label != IGNORE_INDEX for label in labels]
        ids.append(labels[-1])
        if not flags[-1]:  # nothing says what follows the last position
            ids, flags = ids[:-1], flags[:-1]
        tokens, targets = list(self._start), [False] * len(self._start)
        place = 0
        while place < len(ids):
            stop = next((at for at in range(place, len(ids)) if flags[at] != flags[place]), len(ids))
            piece = self._piece(ids, place, stop)
            tokens += piece
            targets += [flags[place]] * len(piece)
            place = stop
        if self.max_length is not None:
            tokens, targets = tokens[: self.max_length + 1], targets[: self.max_length + 1]
        targets[:1] = [False] * len(targets[:1])
        return Document(tokens, targets, int(batch["document_ids"][row, begin]))

    def _piece(self, ids: list[int], begin: int, end: int) -> list[int]:
        """Their tokens for the text of `ids[begin:end]`, between special tokens."""
        tokens: list[int] = []
        place = begin
        for at in [*(at for at in range(begin, end) if ids[at] in self._special), end]:
            if text := self._text(ids, place, at):
                tokens += self.theirs(text, add_special_tokens=False).input_ids
            if at < end:
                tokens += self._special[ids[at]]
            place = at + 1
        return tokens

    def _text(self, ids: list[int], begin: int, end: int) -> str:
        """What `ids[begin:end]` add to the text before them: decoded alone, some would lose a space."""
        context = ids[max(0, begin - _CONTEXT) : begin]
        return self._decoded(context + ids[begin:end])[len(self._decoded(context)) :]

    def _decoded(self, ids: list[int]) -> str:
        text = self.ours.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


_CONTEXT = 6
"""Tokens before a piece that its text may depend on."""


def _documents(batch: TextBatch) -> list[tuple[int, int, int]]:
    """Row, begin and end of every document of a batch."""
    found = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        inside = (batch["document_ids"][row] != PADDING_DOCUMENT).tolist()
        begins = [at for at, position in enumerate(positions) if position == 0 and inside[at]]
        last = max((at + 1 for at in range(len(inside)) if inside[at]), default=0)
        found += [(row, begin, end) for begin, end in zip(begins, [*begins[1:], last], strict=True)]
    return found
