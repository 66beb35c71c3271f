"""Rows with a text and a label, parted: so many of each class to learn from, fixed ones to measure on, and the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from lightllm.datamodules.files import START, Cursor, RowReader
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.text import text_of

Part = Literal["shots", "val", "test", "rest"]


class LabelledRow(NamedTuple):
    """A row whose text and label can be used, and where it stands among all of its source."""

    source: int
    place: int
    label: str
    row: Row


@dataclass
class LabelledRows:
    """Rows of some sources that have certain values in certain fields, with their labels; read when first needed."""

    sources: Sequence[Source]
    text_field: str
    label_field: str
    only: Mapping[str, Any] = field(default_factory=dict)
    """Fields and the values that a row must have there."""

    @cached_property
    def read(self) -> tuple[list[LabelledRow], list[tuple[int, int, BadRow]]]:
        """Good rows, and bad ones with their source and place; none of those that are not to be looked at."""
        good, bad = [], []
        for source, origin in enumerate(self.sources):
            for place, (row, _) in enumerate(origin.rows()):
                if isinstance(row, BadRow):
                    bad.append((source, place, row))
                elif all(row.values.get(name) == value for name, value in self.only.items()):
                    try:
                        text_of(row, self.text_field)
                        good.append(LabelledRow(source, place, label_of(row, self.label_field), row))
                    except BadRow as reason:
                        bad.append((source, place, reason))
        return good, bad

    @cached_property
    def classes(self) -> list[str]:
        """The labels that there are, in their own order."""
        return sorted({row.label for row in self.read[0]})

    def digest(self) -> str:
        """Of all that the rows depend on."""
        return repr(([source.digest() for source in self.sources], self.text_field, self.label_field, dict(self.only)))


@dataclass(frozen=True)
class Parting:
    """How many rows each part has.

    Raises:
        ValueError: A number is not one that a part can have.
    """

    shots: int | None = None
    """Rows of each class to learn from; all that are left when None."""
    val: int = 0
    test: int = 0
    seed: int = 0
    """Of the draw of shots. Those to measure on are always the same."""

    def __post_init__(self) -> None:
        if (self.shots is not None and self.shots < 1) or self.val < 0 or self.test < 0:
            raise ValueError(
                f"data.shots is {self.shots}, val_rows {self.val} and test_rows {self.test}: give numbers of rows"
            )

    def part(self, rows: LabelledRows, part: Part) -> list[LabelledRow]:
        """The rows of a part, in the order of the sources.

        Raises:
            ValueError: There are too few rows, or too few of a class.
        """
        good, _ = rows.read
        if len(good) <= self.val + self.test:
            raise ValueError(
                f"there are {len(good)} labelled rows, and data.val_rows and data.test_rows take {self.val + self.test}"
            )
        order = Random(0).sample(range(len(good)), len(good))  # noqa: S311  (nothing to keep secret)
        measured = {"test": order[: self.test], "val": order[self.test : self.test + self.val]}
        if part in measured:
            return [good[index] for index in sorted(measured[part])]
        left = order[self.test + self.val :]
        chosen = set(left) if self.shots is None else set(self._drawn(rows, left, self.shots))
        return [good[index] for index in sorted(left) if (index in chosen) == (part == "shots")]

    def _drawn(self, rows: LabelledRows, left: list[int], shots: int) -> list[int]:
        by_class: dict[str, list[int]] = defaultdict(list)
        for index in sorted(left):
            by_class[rows.read[0][index].label].append(index)
        drawn = []
        for label in rows.classes:
            random = Random(f"{self.seed} {label}")  # noqa: S311  (nothing to keep secret)
            if len(by_class[label]) < shots:
                raise ValueError(
                    f"data.shots is {shots}, but of the class {label!r} there are {len(by_class[label])} rows beside "
                    "those to measure on: lower it, or data.test_rows"
                )
            drawn += random.sample(by_class[label], shots)
        return drawn


@dataclass
class PartSource(Source):
    """A part of one of the sources."""

    rows_of: LabelledRows
    parting: Parting
    part: Part
    index: int
    """Which of the sources."""

    def __post_init__(self) -> None:
        self.name = self.rows_of.sources[self.index].name

    @override
    def rows(self, start: Cursor = START) -> RowReader:
        made: list[Row | BadRow] = [
            row.row for row in self.parting.part(self.rows_of, self.part) if row.source == self.index
        ]
        if self.part == "shots":  # so that they are told once
            made = [*(bad for source, _, bad in self.rows_of.read[1] if source == self.index), *made]
        for place, row in enumerate(made):
            if place >= start.offset:
                yield row, Cursor(place + 1, row.origin.line + 1)

    @override
    def digest(self) -> str:
        return repr((self.rows_of.digest(), self.parting, self.part, self.index))

    @override
    def num_bytes(self) -> int | None:
        return self.rows_of.sources[self.index].num_bytes()


def label_of(row: Row, field: str) -> str:
    """The label in a row's field, numbers as they are written.

    Raises:
        BadRow: The field is missing, or no label.
    """
    label = row.values.get(field)
    if not isinstance(label, (str, int)) or label == "":
        raise BadRow(row.origin, f"the field {field!r} is no label, but {label!r:.40}")
    return str(label)
