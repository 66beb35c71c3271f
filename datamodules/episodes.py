"""EpisodeData: learning to learn classes from few examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import cast

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.episode_source import EpisodeShape, EpisodeSource
from lightllm.datamodules.labelled_rows import LabelledRows
from lightllm.datamodules.plan import Batches
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import Source


@dataclass(eq=False, kw_only=True)
class EpisodeData(DocumentData):
    """Episodes of N classes and K examples of each, of classes that no other split has.

    The classes of `train` are divided among training, validation and test, always alike. A batch is an episode; the
    label of a text, at its last token, is twice its class within the episode, and 1 more for a query. Episodes are
    drawn by `seed`; those of validation and test are always the same.

    Example:
        ```yaml
        data:
          class_path: lightllm.datamodules.EpisodeData
          init_args:
            train: labelled.jsonl
            ways: 10
            shots: 5
            max_length: 64
        ```
    """

    batches: Batches = field(default_factory=lambda: Batches(mode="sorted", documents=1))
    """How episodes become batches: leave it at one a batch."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    label_field: str = "label"
    """Field that holds the label, text or a whole number."""
    ways: int = 5
    """Classes of an episode."""
    shots: int = 5
    """Examples of each class to learn from."""
    queries: int = 5
    """Examples of each class to classify."""
    episodes: int = 200
    """Episodes to train on."""
    measured_episodes: int = 50
    """Episodes to validate on, and as many to test on."""
    class_split: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of the classes that are for training, validation and test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.longest = self.max_length
        """Tokens of a text at most; what is encoded depends on it."""
        self._shape = EpisodeShape(self.ways, self.shots, self.queries)
        shares = self.class_split
        if min(shares) < 0 or not shares[0] > 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"data.class_split is {list(shares)}: give three shares that add up to 1 (0.6, 0.2, 0.2)")
        if self.val is not None or self.test is not None:
            raise ValueError("measured episodes are of other classes of data.train: leave out data.val and data.test")
        if self.batches.documents != 1:
            raise ValueError("a batch is one episode: set data.batches.documents to 1")
        self.val = self.train if shares[1] else None
        self.test = self.train if shares[2] else None
        self.reading = replace(self.reading, val_fraction=0.0)
        self._labelled: LabelledRows | None = None

    @property
    @override
    def documents_per_row(self) -> int:  # type: ignore[override]  # of the instance here, which says how many
        return self._shape.texts

    @override
    def encode(self, row: Row) -> list[Document]:
        """The texts of an episode as documents."""
        documents = []
        for text, label in zip(row.values["texts"], row.values["labels"], strict=True):
            encoded = self.loaded_tokenizer(text, truncation=True, max_length=self.longest)
            ids = cast(list[int], encoded["input_ids"])
            if not ids:
                raise BadRow(row.origin, "nothing is left of a text as tokens")
            documents.append(Document([*ids, label], [*[False] * len(ids), True]))
        return documents

    @override
    def texts(self, row: Row) -> Iterator[str]:
        yield from row.values["texts"]

    @override
    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        classes = len(self.classes_of(split))
        rank_zero_info(f"{split}: {num_rows:,} episodes, {self.ways}-way {self.shots}-shot, of {classes} classes")

    def classes_of(self, split: str) -> list[str]:
        """The classes of a split, which no other has."""
        classes = self._rows().classes
        order = Random(0).sample(classes, len(classes))  # noqa: S311  (nothing to keep secret)
        first = round(self.class_split[0] * len(order))
        second = first + round(self.class_split[1] * len(order))
        parts = {"train": order[:first], "val": order[first:second], "test": order[second:]}
        return sorted(parts[split])

    @override
    def _sources(self, split: str) -> list[Source]:
        if self.reading.streaming:
            raise ValueError("episodes are drawn from all rows: set data.reading.streaming to false")
        measured = split != "train"
        count = self.measured_episodes if measured else self.episodes
        return [EpisodeSource(self._rows(), self.classes_of(split), self._shape, count, 0 if measured else self.seed)]

    def _rows(self) -> LabelledRows:
        if self._labelled is None:
            self._labelled = LabelledRows(super()._sources("train"), self.text_field, self.label_field)
        return self._labelled
