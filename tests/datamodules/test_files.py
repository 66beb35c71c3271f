from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightllm.datamodules.files import FILE_READERS, PASSAGE_BYTES, START, Cursor, read_text
from lightllm.datamodules.rows import BadRow, Row


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, start: Cursor = START) -> list[tuple[int, Any]]:
    """Line and values, or line and reason, of every row."""
    rows = [row for row, _ in FILE_READERS[path.suffix](path, start)]
    assert all(row.origin.path == str(path) for row in rows)
    return [(row.origin.line, row.reason if isinstance(row, BadRow) else row.values) for row in rows]


def test_short_text_is_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeffOne.\r\n\r\nTwo.\n\n")
    ((row, _),) = read_text(path)
    assert row == Row({"text": "One.\n\nTwo.\n\n"}, row.origin)  # type: ignore[arg-type]
    assert row.origin.line == 1


def test_long_text_is_read_in_passages_that_are_the_file(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {index}: " + "word " * 200 + "\n\n" for index in range(80)]
    path = write(tmp_path, "a.md", "".join(paragraphs))
    rows = [row for row, _ in read_text(path)]
    assert all(isinstance(row, Row) for row in rows)
    texts = [row.values["text"] for row in rows if isinstance(row, Row)]
    assert "".join(texts) == "".join(paragraphs)
    assert len(rows) > 3
    assert max(map(len, texts)) < 1.2 * PASSAGE_BYTES
    assert [row.begins for row in rows if isinstance(row, Row)] == [True] + [False] * (len(rows) - 1)
    assert [row.ends for row in rows if isinstance(row, Row)] == [False] * (len(rows) - 1) + [True]
    lines = path.read_text().splitlines(keepends=True)
    for row, text in zip(rows, texts, strict=True):
        assert "".join(lines[row.origin.line - 1 :]).startswith(text)


def test_text_without_paragraphs_ends_passages_with_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "x" * 99 + "\n" + ("y" * 99 + "\n") * 1000)
    rows = [row for row, _ in read_text(path)]
    assert len(rows) == 4
    assert all(row.values["text"].endswith("\n") for row in rows if isinstance(row, Row))


def test_blank_end_of_a_long_text_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", ("z" * 99 + "\n") * 170 + "\n" * 5)
    rows = [row for row, _ in read_text(path)]
    assert len(rows) == 1
    assert isinstance(rows[0], Row)
    assert rows[0].ends


def test_invalid_utf8_of_a_text_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"good\nbad \xff\nalso good\n")
    assert read(path) == [
        (1, {"text": "good\n"}),
        (2, "invalid UTF-8: byte 0xff at position 5 of the line"),
        (3, {"text": "also good\n"}),
    ]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_text_file(tmp_path: Path, content: str) -> None:
    assert read(write(tmp_path, "a.txt", content)) == [(1, "the file holds no text")]


def test_json_lines_and_every_way_to_break_them(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b'{"text": "broken"',
        b"",
        b"[1, 2]",
        b'{"text": "\xff"}',
        b'{"text": "half \\ud800 pair"}',
        '{"text": "last ü \\ud83d\\ude00"}'.encode(),
        b"",
    ]
    path = write(tmp_path, "a.jsonl", b"\n".join(lines))
    assert read(path) == [
        (1, {"text": "first"}),
        (2, "broken JSON: Expecting ',' delimiter (character 18 of the line)"),
        (3, "empty line"),
        (4, "a JSON object is expected, not [1, 2]"),
        (5, "invalid UTF-8: byte 0xff at position 11 of the line"),
        (6, "invalid Unicode: half of a surrogate pair"),
        (7, {"text": "last ü 😀"}),
    ]


def test_blank_lines_at_the_end_are_none(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.jsonl", '{"a": 1}\n\n\n')) == [(1, {"a": 1})]


def test_json_array_knows_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[\n  {"a": "]"},\n\n  {"a":\n 2}, 3\n]\n')
    assert read(path) == [(2, {"a": "]"}), (4, {"a": 2}), (5, "a JSON object is expected, not 3")]
    assert read(write(tmp_path, "b.json", "[]")) == []


def test_broken_json_array_gives_what_comes_before(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[{"a": 1},\n{"a": }, {"a": 3}]')
    assert read(path) == [(1, {"a": 1}), (2, "broken JSON (Expecting value): nothing behind it can be read")]
    (row,) = read(write(tmp_path, "b.json", b'[{"a": "\xff"}]'))
    assert row[1].startswith("invalid UTF-8")


def test_json_file_of_lines(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_csv_with_quotes_line_breaks_and_faults(tmp_path: Path) -> None:
    content = b'text,label\n"one, ""two""\nthree",x\nshort\n\nbad \xff,y\nfour,z\n'
    assert read(write(tmp_path, "a.csv", content)) == [
        (2, {"text": 'one, "two"\nthree', "label": "x"}),
        (4, "1 fields, but the header has 2"),
        (6, "invalid UTF-8"),
        (7, {"text": "four", "label": "z"}),
    ]
    assert read(write(tmp_path, "b.csv", "")) == [(1, "the file is empty: a header line is expected")]
    assert read(write(tmp_path, "c.csv", 'a,b\n"x"y,z\n'))[0][1].startswith("broken CSV")
    assert read(write(tmp_path, "d.tsv", "a\tb\n1,2\t3\n")) == [(2, {"a": "1,2", "b": "3"})]


def contents() -> dict[str, str]:
    rows = [{"text": f"row {index} " + "w " * index} for index in range(30)]
    return {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "a.json": json.dumps(rows, indent=1),
        "a.csv": "text\n" + "".join(row["text"] + "\n" for row in rows),
        "a.txt": "".join(row["text"] * 50 + "\n\n" for row in rows),
    }


@pytest.mark.parametrize("name", contents())
def test_reading_goes_on_behind_any_row(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, contents()[name])
    reader = FILE_READERS[path.suffix]
    whole = list(reader(path, START))
    assert len(whole) > 2
    for index, (_, cursor) in enumerate(whole):
        assert list(reader(path, cursor)) == whole[index + 1 :]


def test_reading_goes_on_behind_a_bad_line_of_a_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"one\n\xff\ntwo\n" + b"three\n" * 9000)
    whole = [(str(row), cursor) for row, cursor in read_text(path)]
    for index, (_, cursor) in enumerate(whole):
        assert [(str(row), after) for row, after in read_text(path, cursor)] == whole[index + 1 :]
