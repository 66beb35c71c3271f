"""Rows: what a source holds before tokenisation, and what is wrong with some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """Where a row comes from."""

    path: str
    """File, hub id or name of the source."""
    line: int
    """Line of the file, or row of the table, counted from 1."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class Row(NamedTuple):
    """One row of a source: a JSON object, a table's row, a passage of a text file (`{"text": ...}`)."""

    values: Mapping[str, Any]
    origin: Origin
    begins: bool = True
    """False where the row goes on with the text of the row before it (a long file is read in passages)."""
    ends: bool = True
    """False where the next row goes on with this row's text."""


class BadRow(ValueError):
    """A row that can't become a document: broken, empty, a field missing, roles out of order.

    Readers and `DocumentData.encode` raise it. What happens then is the user's choice: stop before training with
    all the bad rows' places, or skip and count them.
    """

    def __init__(self, origin: Origin, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin = origin
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[Origin, str]]:  # crosses the border of a worker process
        return type(self), (self.origin, self.reason)
