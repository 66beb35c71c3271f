"""Pairs of texts that have the same label, out of rows that have a text and a label each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from random import Random

from typing_extensions import override

from lightllm.datamodules.files import START, Cursor, RowReader
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.text import text_of

ANCHOR, POSITIVE = "anchor", "positive"
"""Fields of the rows that are made."""


@dataclass
class LabelPairSource(Source):
    """Rows `{"anchor", "positive"}` of two texts with the same label; each text is the anchor of so many others.

    Rows of a label are put together by one more than that, or two more, where one would be left. Pairs are made among
    those alone, and all have the origin of the first: they are held out together, and no text is on both sides.
    """

    source: Source
    field: str
    label_field: str
    seed: int
    partners: int = 1
    """Others that a text is paired with, if there are as many."""

    def __post_init__(self) -> None:
        self.name = self.source.name

    @override
    def rows(self, start: Cursor = START) -> RowReader:
        made: list[Row | BadRow] = []
        by_label: dict[object, list[tuple[Origin, str]]] = defaultdict(list)
        for row, _ in self.source.rows():
            if isinstance(row, BadRow):
                made.append(row)
                continue
            try:
                text = text_of(row, self.field)
                label = row.values.get(self.label_field)
                if label is None or not isinstance(label, (str, int)):
                    raise BadRow(row.origin, f"the field {self.label_field!r} is no label, but {label!r:.40}")
                by_label[label].append((row.origin, text))
            except BadRow as bad:
                made.append(bad)
        random = Random(self.seed)  # noqa: S311  (nothing to keep secret)
        for label, texts in by_label.items():
            made += self._pairs(label, random.sample(texts, len(texts)))
        for place, row in enumerate(made):
            if place >= start.offset:
                yield row, Cursor(place + 1, row.origin.line + 1)

    @override
    def digest(self) -> str:
        return repr((self.source.digest(), self.field, self.label_field, self.seed, self.partners))

    @override
    def num_bytes(self) -> int | None:
        size = self.source.num_bytes()
        return None if size is None else 2 * size

    def _pairs(self, label: object, texts: list[tuple[Origin, str]]) -> list[Row | BadRow]:
        if len(texts) == 1:
            return [BadRow(texts[0][0], f"the only row with the label {label!r}: there is nothing to pair it with")]
        made: list[Row | BadRow] = []
        size, begin = self.partners + 1, 0
        while begin < len(texts):
            end = len(texts) if len(texts) - begin == size + 1 else min(begin + size, len(texts))
            group = texts[begin:end]
            for place, (_, text) in enumerate(group):
                for step in range(1, min(self.partners, len(group) - 1) + 1):
                    other = group[(place + step) % len(group)][1]
                    made.append(Row({ANCHOR: text, POSITIVE: other}, group[0][0]))
            begin = end
        return made
