from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightllm.datamodules.files import Cursor
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sentence_pair_source import SentencePairSource, passages
from lightllm.datamodules.sources import FileSource


def written(folder: Path, texts: list[str | None]) -> FileSource:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({} if text is None else {"text": text}) + "\n" for text in texts))
    return FileSource(str(path))


def documents(count: int, sentences: int) -> list[str | None]:
    return [" ".join(f"Document {d} says sentence {s}." for s in range(sentences)) for d in range(count)]


def pairs(source: FileSource, **fields: Any) -> list[Any]:
    settings = {"field": "text", "kind": "next", "words": 1, "seed": 0} | fields
    return [row for row, _ in SentencePairSource(source, **settings).rows()]  # type: ignore[arg-type]


def numbers(passage: str) -> tuple[int, int]:
    words = passage.rstrip(".").split()
    return int(words[1]), int(words[4])


def test_passages_are_whole_sentences() -> None:
    text = 'One two. "Three four five!" Six? Seven eight\n\nNine. Ten'
    assert passages(text, 1) == ["One two.", '"Three four five!', "Six?", "Seven eight", "Nine.", "Ten"]
    assert passages(text, 4) == ['One two. "Three four five!', "Six? Seven eight Nine.", "Ten"]
    assert passages("no end", 5) == ["no end"]


def test_half_of_the_seconds_follow_and_half_are_of_other_documents(tmp_path: Path) -> None:
    found = pairs(written(tmp_path, documents(30, 20)))
    assert len(found) == 30 * 19
    follows = [row for row in found if row.values["label"] == 0]
    assert 0.4 < len(follows) / len(found) < 0.6
    others = set()
    for row in found:
        (first, place), (second, behind) = numbers(row.values["first"]), numbers(row.values["second"])
        assert first == row.origin.line - 1
        if row.values["label"] == 0:
            assert (second, behind) == (first, place + 1)
        else:
            assert second != first
            others.add(second)
    assert len(others) == 30


def test_order_swaps_neighbours(tmp_path: Path) -> None:
    found = pairs(written(tmp_path, documents(3, 40)), kind="order")
    swapped = [row for row in found if row.values["label"] == 1]
    assert 0.3 < len(swapped) / len(found) < 0.7
    for row in found:
        (first, place), (second, behind) = numbers(row.values["first"]), numbers(row.values["second"])
        assert first == second
        assert behind - place == (1 if row.values["label"] == 0 else -1)


def test_the_same_seed_makes_the_same_pairs_from_any_row_on(tmp_path: Path) -> None:
    source = written(tmp_path, documents(4, 6))
    one, other = pairs(source), pairs(source, seed=1)
    assert one == pairs(source)
    assert one != other
    made = SentencePairSource(source, "text", "next", 1, 0)
    later = [row for row, _ in made.rows(Cursor(5, 1))]
    assert later == one[5:]
    assert made.digest() != SentencePairSource(source, "text", "next", 2, 0).digest()
    assert made.name == source.name


def test_bad_rows_come_first_and_too_few_documents_are_refused(tmp_path: Path) -> None:
    found = pairs(written(tmp_path, ["A b. C d.", None, "E f. G h."]))
    assert isinstance(found[0], BadRow)
    assert found[0].origin.line == 2
    assert all(isinstance(row, Row) for row in found[1:])
    assert len(found) == 3
    with pytest.raises(ValueError, match="holds 1 documents, so there is none"):
        pairs(written(tmp_path, ["A b. C d."]))
    assert len(pairs(written(tmp_path, ["A b. C d."]), kind="order")) == 1
