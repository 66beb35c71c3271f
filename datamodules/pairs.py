"""PairData: texts that belong together, such as question and answer, or a text, one like it and one unlike it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.label_pair_source import ANCHOR, POSITIVE, LabelPairSource
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.text import text_of

LEVELS = 200
"""Scores are told apart in so many steps at most, which is finer than any that people give."""


@dataclass(eq=False, kw_only=True)
class PairData(DocumentData):
    """Texts to embed, of which those of a row belong together: for `ContrastivePretraining`.

    Every text is a document, with the special tokens that the tokenizer itself puts there, cut at `max_length`; those
    of a row stay in one batch. The only label of a row's first document, at its last token, says how many they are,
    that of its second one how alike the two are, if the data says so.

    Example:
        ```yaml
        data:
          class_path: lightllm.datamodules.PairData
          init_args:
            train: pydoc-preference
            fields: [prompt, chosen]
            max_length: 128
            batches: {mode: sorted, documents: 64}
        ```
    """

    fields: list[str] = field(default_factory=lambda: ["anchor", "positive"])
    """Fields of a row that hold its texts: the anchor, its positive, and any number of hard negatives. One field alone
    is for `positives: dropout`."""
    label_field: str | None = None
    """Make pairs of rows that have the same value here: the first of `fields` of one with that of another. Always the
    same pairs for a seed."""
    partners: int = 1
    """By label: so many others that each text is paired with. A text is only in training, or only held out."""
    score_field: str | None = None
    """Field with a number that says how alike the first two texts are; only measured, not learned."""
    score_range: tuple[float, float] = (0.0, 1.0)
    """The least and the largest of such numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.score_range
        if not self.fields:
            raise ValueError("data.fields is empty: name the field of the anchor, or of anchor and positive")
        if self.label_field is not None and len(self.fields) != 1:
            raise ValueError(f"data.fields are {self.fields}, but pairs by label take one: name the text's")
        if self.score_field is not None and self.num_texts == 1:
            raise ValueError("data.score_field tells how alike two texts are, and data.fields names one: name two")
        if self.partners < 1:
            raise ValueError(f"data.partners is {self.partners}: a text is paired with one other at least")
        if not low < high:
            raise ValueError(f"data.score_range is {[low, high]}: give the least and the largest score")
        self.longest = self.max_length
        """Tokens of a text at most; what is encoded depends on it."""

    @property
    def num_texts(self) -> int:
        """Texts of a row, or of two by label."""
        return 2 if self.label_field is not None else len(self.fields)

    @property
    @override
    def documents_per_row(self) -> int:  # type: ignore[override]  # of the instance here, which says how many
        return self.num_texts

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row's texts as documents."""
        names = [ANCHOR, POSITIVE] if self.label_field is not None else self.fields
        labels = [len(names), self._level(row), *[0] * len(names)]
        return [self._document(row, *named) for named in zip(names, labels, strict=False)]

    @override
    def texts(self, row: Row) -> Iterator[str]:
        for name in [ANCHOR] if self.label_field is not None else self.fields:
            yield text_of(row, name)

    @override
    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        what = f"texts of the same {self.label_field}" if self.label_field is not None else ", ".join(self.fields)
        rank_zero_info(f"{split}: {what}, {'streamed' if num_rows is None else f'{num_rows:,} rows'}")

    def _document(self, row: Row, name: str, label: int) -> Document:
        encoded = self.loaded_tokenizer(text_of(row, name), truncation=True, max_length=self.longest)
        ids = cast(list[int], encoded["input_ids"])
        if not ids:
            raise BadRow(row.origin, f"nothing is left of {name!r} as tokens")
        return Document([*ids, label], [*[False] * len(ids), True])

    def _level(self, row: Row) -> int:
        """A token id, as labels are: from 1 to `LEVELS` + 1, or 0 where nothing is said."""
        if self.score_field is None:
            return 0
        score, (low, high) = row.values.get(self.score_field), self.score_range
        if not isinstance(score, (int, float)) or not low <= score <= high:
            raise BadRow(row.origin, f"the field {self.score_field!r} is no number in {[low, high]}, but {score!r:.40}")
        return 1 + round((score - low) / (high - low) * min(LEVELS, len(self.loaded_tokenizer) - 2))

    @override
    def _sources(self, split: str) -> list[Source]:
        sources = super()._sources(split)
        if self.label_field is None:
            return sources
        if self._is_streamed(split):
            raise ValueError("pairs by label are made of whole sources: set data.reading.streaming to false")
        return [
            LabelPairSource(source, self.fields[0], self.label_field, self.seed, self.partners) for source in sources
        ]
