"""Pairs of passages out of documents: the second follows the first, or it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

from typing_extensions import override

from lightllm.datamodules.files import START, Cursor, RowReader
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.text import text_of

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n\s*\n")

FOLLOWS, DOES_NOT = 0, 1
"""The labels of pairs, as transformers numbers them."""


@dataclass
class SentencePairSource(Source):
    """Rows `{"first", "second", "label"}`, made of the documents of another source.

    A passage is whole sentences, at least so many words of them. Each but the last of a document is the first of a
    pair. Its second is the passage after it, or, with even chances, another: of another document, or, for the order of
    sentences, the two change places.
    """

    source: Source
    field: str
    kind: Literal["next", "order"]
    words: int
    seed: int

    def __post_init__(self) -> None:
        self.name = self.source.name

    @override
    def rows(self, start: Cursor = START) -> RowReader:
        documents, place = [], 0
        for row, after in self.source.rows():
            try:
                documents.append(self._document(row))
            except BadRow as bad:
                place += 1
                if place > start.offset:
                    yield bad, Cursor(place, after.line)
        if self.kind == "next" and len(documents) < 2:
            raise ValueError(
                f"{self.name} holds {len(documents)} documents, so there is none that a pair's second passage could be "
                "taken from: give more, or set data.pairs to order"
            )
        for row in self._pairs(documents):
            place += 1
            if place > start.offset:
                yield row, Cursor(place, row.origin.line + 1)

    @override
    def digest(self) -> str:
        return repr((self.source.digest(), self.field, self.kind, self.words, self.seed))

    @override
    def num_bytes(self) -> int | None:
        size = self.source.num_bytes()
        return None if size is None else 2 * size

    def _document(self, row: Row | BadRow) -> tuple[Origin, list[str]]:
        if isinstance(row, BadRow):
            raise row
        return row.origin, passages(text_of(row, self.field), self.words)

    def _pairs(self, documents: list[tuple[Origin, list[str]]]) -> Iterator[Row]:
        random = Random(self.seed)  # noqa: S311  (nothing to keep secret)
        for index, (origin, texts) in enumerate(documents):
            for first, second in pairwise(texts):
                label = FOLLOWS if random.random() < 0.5 else DOES_NOT
                if label == DOES_NOT and self.kind == "order":
                    first, second = second, first
                elif label == DOES_NOT:
                    other = random.randrange(len(documents) - 1)
                    second = random.choice(documents[other + (other >= index)][1])
                yield Row({"first": first, "second": second, "label": label}, origin)


def passages(text: str, words: int) -> list[str]:
    """Consecutive passages of whole sentences, each of at least so many words but perhaps the last."""
    found: list[str] = []
    sentences: list[str] = []
    count = 0
    for sentence in filter(str.strip, _SENTENCE_END.split(text)):
        sentences.append(sentence.strip())
        count += len(sentence.split())
        if count >= words:
            found.append(" ".join(sentences))
            sentences, count = [], 0
    return [*found, " ".join(sentences)] if sentences else found
