"""Readers of one file each: from bytes to rows that know their line.

A reader takes a file's path and where to begin, and yields each row (or what is wrong with it) together with the
place where reading goes on behind it, so that a stream can be resumed without reading all of it again.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lightllm.datamodules.rows import BadRow, Origin, Row

PASSAGE_BYTES = 16_384
"""A text file is read in passages of about this size, which end with a paragraph, or at least with a line."""


class Cursor(NamedTuple):
    """A place in a source."""

    offset: int = 0
    """Bytes of a file, or rows of a table, that come before it."""
    line: int = 1
    """Line of a file, or row of a table, counted from 1."""


START = Cursor()

RowReader = Iterator[tuple[Row | BadRow, Cursor]]
"""Rows, each with the place behind it."""


def read_text(path: Path, start: Cursor = START) -> RowReader:
    """The passages of a text file, each as `{"text": …}`; together they are the file."""
    held: tuple[Row, Cursor] | None = None  # until it is known whether more text follows
    lines: list[str] = []
    size, first, begins = 0, start.line, start.offset == 0

    def passage(after: Cursor) -> tuple[Row, Cursor] | None:
        text = "".join(lines)
        return (Row({"text": text}, Origin(str(path), first), begins), after) if text.strip() else None

    after = start
    for line, raw, behind in _lines(path, start):
        text = _decoded(raw, Origin(str(path), line))
        if isinstance(text, BadRow) or size >= 2 * PASSAGE_BYTES or (size >= PASSAGE_BYTES and not text.strip()):
            finished = passage(after)
            if finished is not None:
                if held is not None:
                    yield held[0]._replace(ends=False), held[1]
                held, begins = finished, False
            lines, size = [], 0
        if isinstance(text, BadRow):
            if held is not None:
                yield held[0]._replace(ends=False), held[1]
                held = None
            yield text, behind
        else:
            first = first if lines else line
            lines.append(text)
            size += len(raw)
        after = behind
    last = passage(after)
    if held is not None:
        yield held[0]._replace(ends=last is None), held[1]
    if last is not None:
        yield last
    elif held is None and begins:
        yield BadRow(Origin(str(path), 1), "the file holds no text"), after


def read_json_lines(path: Path, start: Cursor = START) -> RowReader:
    """One JSON object a line; blank lines are bad rows, but not at the end of the file."""
    blank: list[tuple[BadRow, Cursor]] = []
    for line, raw, after in _lines(path, start):
        origin = Origin(str(path), line)
        if not raw.strip():
            blank.append((BadRow(origin, "empty line"), after))
            continue
        yield from blank
        blank.clear()
        text = _decoded(raw, origin)
        yield (text if isinstance(text, BadRow) else _json_row(text, origin)), after


def read_json(path: Path, start: Cursor = START) -> RowReader:
    """A JSON array of objects, or, as many files called .json are, one object a line."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from read_json_lines(path, start)
        return
    text = _decoded(path.read_bytes(), Origin(str(path), 1))
    if isinstance(text, BadRow):
        yield text, start
        return
    decoder, at, line = json.JSONDecoder(), 0, 1
    skip = _BETWEEN_ELEMENTS.match(text, text.index("[") + 1)
    for index in itertools.count():
        assert skip is not None  # the pattern matches nothing, too
        line += text.count("\n", at, skip.end())
        at = skip.end()
        if text.startswith("]", at):
            return
        origin = Origin(str(path), line)
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield BadRow(origin, f"broken JSON ({error.msg}): nothing behind it can be read"), start
            return
        if index >= start.offset:
            yield _object_row(value, origin), Cursor(index + 1, line)
        line += text.count("\n", at, end)
        at, skip = end, _BETWEEN_ELEMENTS.match(text, end)


def read_csv(path: Path, start: Cursor = START) -> RowReader:
    """A table with a header line, separated by commas (or by tabs, in a .tsv file); every value is a string."""
    csv.field_size_limit(2**31 - 1)  # whole documents stand in fields
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        header = next(reader, None)
        if header is None:
            yield BadRow(Origin(str(path), 1), "the file is empty: a header line is expected"), start
            return
        for index in itertools.count():
            origin = Origin(str(path), reader.line_num + 1)
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield BadRow(origin, f"broken CSV ({error}): nothing behind it can be read"), start
                return
            if values is None:
                return
            if index >= start.offset and values:
                yield _table_row(header, values, origin), Cursor(index + 1, reader.line_num + 1)


FILE_READERS: dict[str, Callable[[Path, Cursor], RowReader]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
"""Readers by the file's suffix."""

_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")


def _lines(path: Path, start: Cursor) -> Iterator[tuple[int, bytes, Cursor]]:
    """Lines with their numbers, and the place behind each."""
    with path.open("rb") as file:
        file.seek(start.offset)
        offset = start.offset
        for line, raw in enumerate(file, start.line):
            offset += len(raw)
            yield line, raw, Cursor(offset, line + 1)


def _decoded(raw: bytes, origin: Origin) -> str | BadRow:
    """The text of one line, without a byte order mark, its break a bare line feed."""
    try:
        text = raw.decode("utf-8-sig" if origin.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return BadRow(origin, f"invalid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line")
    return text.replace("\r\n", "\n")


def _json_row(text: str, origin: Origin) -> Row | BadRow:
    try:
        value = json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        return BadRow(origin, f"broken JSON: {error.msg} (character {error.pos + 1} of the line)")
    if "\\ud" in text.lower():  # half of an escaped surrogate pair is valid JSON, but no text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return BadRow(origin, "invalid Unicode: half of a surrogate pair")
    return _object_row(value, origin)


def _object_row(value: object, origin: Origin) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(origin, f"a JSON object is expected, not {json.dumps(value)[:40]}")
    return Row(value, origin)


def _table_row(header: list[str], values: list[str], origin: Origin) -> Row | BadRow:
    if len(values) != len(header):
        return BadRow(origin, f"{len(values)} fields, but the header has {len(header)}")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return BadRow(origin, "invalid UTF-8")
    return Row(dict(zip(header, values, strict=True)), origin)
