"""Episodes out of labelled rows: a few classes, a few examples of each to learn from, and others to classify."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from random import Random

from typing_extensions import override

from lightllm.datamodules.files import START, Cursor, RowReader
from lightllm.datamodules.labelled_rows import LabelledRow, LabelledRows
from lightllm.datamodules.rows import Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.text import text_of


@dataclass(frozen=True)
class EpisodeShape:
    """How large an episode is.

    Raises:
        ValueError: It has fewer than two classes, or no example.
    """

    ways: int
    """Classes."""
    shots: int
    """Examples of each to learn from."""
    queries: int
    """Examples of each to classify."""

    def __post_init__(self) -> None:
        if self.ways < 2 or self.shots < 1 or self.queries < 1:
            raise ValueError(
                f"an episode has at least two classes, and an example of each to learn from and to classify, but "
                f"data.ways is {self.ways}, data.shots {self.shots} and data.queries {self.queries}"
            )

    @property
    def texts(self) -> int:
        """Examples of an episode."""
        return self.ways * (self.shots + self.queries)


@dataclass
class EpisodeSource(Source):
    """Rows `{"texts": […], "labels": […]}`, an episode each, of classes of their own.

    A text's label is twice its class within the episode, from 0 on, and 1 more for one that is to be classified.
    """

    labelled: LabelledRows
    classes: list[str]
    shape: EpisodeShape
    count: int
    """Episodes."""
    seed: int

    def __post_init__(self) -> None:
        self.name = ", ".join(source.name for source in self.labelled.sources)

    @cached_property
    def by_class(self) -> dict[str, list[LabelledRow]]:
        """The rows of each class that has enough for an episode."""
        found: dict[str, list[LabelledRow]] = defaultdict(list)
        for row in self.labelled.read[0]:
            if row.label in self.classes:
                found[row.label].append(row)
        needed = self.shape.shots + self.shape.queries
        return {label: found[label] for label in self.classes if len(found[label]) >= needed}

    @override
    def rows(self, start: Cursor = START) -> RowReader:
        if len(self.by_class) < self.shape.ways:
            raise ValueError(
                f"episodes are of {self.shape.ways} classes, and {len(self.by_class)} of {len(self.classes)} have "
                f"{self.shape.shots + self.shape.queries} rows: lower data.ways, data.shots or data.queries, or set "
                "data.class_split"
            )
        for place in range(start.offset, self.count):
            yield self._episode(Random(f"{self.seed} {place}")), Cursor(place + 1, 1)  # noqa: S311

    def _episode(self, random: Random) -> Row:
        texts, labels, origin = [], [], None
        for number, label in enumerate(random.sample(list(self.by_class), self.shape.ways)):
            chosen = random.sample(self.by_class[label], self.shape.shots + self.shape.queries)
            for place, one in enumerate(chosen):
                texts.append(text_of(one.row, self.labelled.text_field))
                labels.append(2 * number + (place >= self.shape.shots))
                origin = origin or one.row.origin
        assert origin is not None
        return Row({"texts": texts, "labels": labels}, origin)

    @override
    def digest(self) -> str:
        return repr((self.labelled.digest(), self.classes, self.shape, self.count, self.seed))

    @override
    def num_bytes(self) -> int | None:
        return None
