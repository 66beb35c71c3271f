"""ClassificationData: texts and their classes, of which few are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.documents import DocumentSet, select_documents
from lightllm.datamodules.labelled_rows import LabelledRows, Part, Parting, PartSource, label_of
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.text import text_of


@dataclass(eq=False, kw_only=True)
class ClassificationData(DocumentData):
    """One task with few labels: so many rows of each class to learn from, fixed ones to measure on, and the rest.

    A row has a text and a label. Each is a document, cut at `max_length`, with the special tokens that the tokenizer
    itself puts there; its only label, at its last token, is the number of its class in `classes`. Validation and test
    are drawn from `train` too, always the same rows whatever `shots` and `seed` are, unless they have sources of their
    own. What is left is for methods that learn from texts without labels: see `unlabelled`.

    Example:
        ```yaml
        data:
          class_path: lightllm.datamodules.ClassificationData
          init_args:
            train: reviews.jsonl
            shots: 8
            test_rows: 1000
            max_length: 64
            batches: {mode: sorted, documents: 16}
        ```
    """

    text_field: str = "text"
    """Field of a row that holds the text."""
    label_field: str = "label"
    """Field that holds the label, text or a whole number."""
    shots: int | None = None
    """Rows of each class to learn from, drawn by `seed`; all that are not measured on when None."""
    val_rows: int = 100
    """Rows to validate on, unless `val` is given."""
    test_rows: int = 1000
    """Rows to test on, unless `test` is given."""
    only: dict[str, Any] = field(default_factory=dict)
    """Look at rows only that have these values in these fields, such as `{domain: movies}`."""
    measured_only: dict[str, Any] | None = None
    """Which rows are validated and tested on, if others than those that are learned from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.classes: list[str] = []
        """The classes by their numbers, from `prepare_data` or `setup` on."""
        self.longest = self.max_length
        """Tokens of a text at most; what is encoded depends on it."""
        self._own = {"val": self.val is not None, "test": self.test is not None}
        self.val = self.val or (self.train if self.val_rows else None)
        self.test = self.test or (self.train if self.test_rows else None)
        self.reading = replace(self.reading, val_fraction=0.0)
        self._rows: dict[str, LabelledRows] = {}
        self._parting()
        if self.measured_only is not None and not any(
            self.only.get(name, value) != value for name, value in self.measured_only.items()
        ):
            raise ValueError(
                f"data.measured_only is {self.measured_only}, and data.only is {self.only}: give a field "
                "another value in each, or texts would be measured on that were learned from"
            )

    @override
    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.classes = self._labelled("train").classes  # rows are encoded by their numbers
        if len(self.classes) < 2:
            raise ValueError(f"the field {self.label_field!r} of data.train has {self.classes}: two classes are least")

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row's text as a document, whose one label is its class."""
        label = label_of(row, self.label_field)
        if label not in self.classes:
            raise BadRow(row.origin, f"the class {label!r} is none of data.train: {self.classes}")
        encoded = self.loaded_tokenizer(text_of(row, self.text_field), truncation=True, max_length=self.longest)
        ids = cast(list[int], encoded["input_ids"])
        if not ids:
            raise BadRow(row.origin, "nothing is left of the text as tokens")
        return [Document([*ids, self.classes.index(label)], [*[False] * len(ids), True])]

    @override
    def texts(self, row: Row) -> Iterator[str]:
        yield text_of(row, self.text_field)

    @override
    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        shots = "all rows" if self.shots is None else f"{self.shots} of each"
        rank_zero_info(f"{split}: {len(self.classes)} classes, {shots if split == 'train' else f'{num_rows:,} rows'}")

    def unlabelled(self) -> DocumentSet:
        """The rest: documents of `train` that are neither learned from nor measured on.

        Their labels are there, to measure by; a method that learns from these texts must not look at them.

        Raises:
            ValueError: There is no rest, because all rows are learned from.
        """
        if "rest" not in self.documents:
            store = self._store("rest")
            rows = np.arange(len(store))
            self.documents["rest"] = select_documents(store, rows, 1, self.max_length, self.overflow)
        if not len(self.documents["rest"]):
            raise ValueError("no texts are left without a label: set data.shots, and lower data.test_rows")
        return self.documents["rest"]

    @override
    def _sources(self, split: str) -> list[Source]:
        if self.reading.streaming:
            raise ValueError("shots are drawn from all rows: set data.reading.streaming to false")
        rows = self._labelled(split)
        parts: dict[str, Part] = {"train": "shots", "val": "val", "test": "test", "rest": "rest"}
        part, parting = parts[split], self._parting()
        if self._own.get(split):  # a source of its own, of which every row is measured
            part, parting = "shots", Parting()
        elif self.measured_only is not None and split in ("train", "rest"):  # they are measured on others
            parting = replace(parting, val=0, test=0)
        return [PartSource(rows, parting, part, index) for index in range(len(rows.sources))]

    def _labelled(self, split: str) -> LabelledRows:
        measured = split in self._own
        key = split if self._own.get(split) else "measured" if measured and self.measured_only else "train"
        if key not in self._rows:
            only = self.only if key == "train" or self.measured_only is None else self.measured_only
            sources = super()._sources(split if self._own.get(split) else "train")
            self._rows[key] = LabelledRows(sources, self.text_field, self.label_field, only)
        return self._rows[key]

    def _parting(self) -> Parting:
        val, test = (
            0 if self._own[split] else rows for split, rows in (("val", self.val_rows), ("test", self.test_rows))
        )
        return Parting(self.shots, val, test, self.seed)
