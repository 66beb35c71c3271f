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
    """Rows `{"anchor", "positive"}` of two texts with the same label; each text is once the anchor.

    Two rows are each other's positives, or three in a ring where their number is odd. All of these have the origin of
    the first, so that they are held out together, and no text is on both sides.
    """

    source: Source
    field: str
    label_field: str
    seed: int

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
        return repr((self.source.digest(), self.field, self.label_field, self.seed))

    @override
    def num_bytes(self) -> int | None:
        size = self.source.num_bytes()
        return None if size is None else 2 * size

    def _pairs(self, label: object, texts: list[tuple[Origin, str]]) -> list[Row | BadRow]:
        if len(texts) == 1:
            return [BadRow(texts[0][0], f"the only row with the label {label!r}: there is nothing to pair it with")]
        made: list[Row | BadRow] = []
        for begin in range(0, len(texts) - 1, 2):
            group = texts[begin:] if len(texts) - begin == 3 else texts[begin : begin + 2]
            for place, (_, text) in enumerate(group):
                other = group[(place + 1) % len(group)][1]
                made.append(Row({ANCHOR: text, POSITIVE: other}, group[0][0]))
            if len(group) == 3:
                break
        return made
