from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from labelled_texts import labelled_rows, save_labelled

from lightllm.datamodules.files import Cursor
from lightllm.datamodules.labelled_rows import LabelledRows, Parting, PartSource, label_of
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.sources import FileSource


def rows_of(folder: Path, rows: list[Any] | None = None, **only: Any) -> LabelledRows:
    file = save_labelled(folder / "rows.jsonl", labelled_rows() if rows is None else rows)
    return LabelledRows([FileSource(file)], "text", "label", only)


def places(rows: LabelledRows, parting: Parting, part: Any) -> list[int]:
    return [row.place for row in parting.part(rows, part)]


def test_parts_are_all_rows_and_share_none(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    parting = Parting(shots=4, val=5, test=10, seed=3)
    found = {part: places(rows, parting, part) for part in ("shots", "val", "test", "rest")}
    assert [len(found[part]) for part in ("shots", "val", "test", "rest")] == [12, 5, 10, 33]
    assert sorted(place for part in found.values() for place in part) == list(range(60))
    assert all(part == sorted(part) for part in found.values())
    labels = Counter(row.label for row in parting.part(rows, "shots"))
    assert set(labels.values()) == {4}
    assert rows.classes == ["class 0", "class 1", "class 2"]


def test_measured_rows_are_the_same_whatever_is_learned_from(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    partings = [Parting(shots, 5, 10, seed) for shots in (2, 4, None) for seed in (0, 1)]
    for part in ("val", "test"):
        assert len({tuple(places(rows, one, part)) for one in partings}) == 1
    shots = [places(rows, one, "shots") for one in partings]
    assert shots[0] != shots[1]
    assert shots[4] == shots[5]
    assert len(shots[4]) == 45
    assert not places(rows, partings[4], "rest")


def test_sources_yield_their_own_rows_of_a_part(tmp_path: Path) -> None:
    made = labelled_rows()
    files = [save_labelled(tmp_path / name, part) for name, part in (("a.jsonl", made[:25]), ("b.jsonl", made[25:]))]
    rows = LabelledRows([FileSource(file) for file in files], "text", "label")
    parting = Parting(3, 0, 6)
    found = [[row for row, _ in PartSource(rows, parting, "shots", index).rows()] for index in range(2)]
    assert sum(map(len, found)) == 9
    for index, source in enumerate(found):
        assert all(isinstance(row, Row) and row.origin.path == files[index] for row in source)
    source = PartSource(rows, parting, "rest", 1)
    whole = [row for row, _ in source.rows()]
    assert [row for row, _ in source.rows(Cursor(3, 1))] == whole[3:]
    assert source.digest() != PartSource(rows, Parting(3, 0, 6, seed=1), "rest", 1).digest()


def test_bad_rows_are_told_with_the_shots(tmp_path: Path) -> None:
    made: list[Any] = [*labelled_rows(), {"text": "no label"}, {"text": "", "label": "class 0"}]
    rows = rows_of(tmp_path, made)
    bad = [row for row, _ in PartSource(rows, Parting(2), "shots", 0).rows() if isinstance(row, BadRow)]
    assert [row.origin.line for row in bad] == [61, 62]
    assert not any(isinstance(row, BadRow) for row, _ in PartSource(rows, Parting(2), "rest", 0).rows())


def test_rows_of_one_domain(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, domain="x")
    assert {row.row.values["domain"] for row in rows.read[0]} == {"x"}
    assert len(rows.read[0]) == 30
    assert rows.digest() != rows_of(tmp_path, domain="y").digest()


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    with pytest.raises(ValueError, match=r"there are 60 labelled rows, and data\.val_rows and data\.test_rows take 60"):
        Parting(1, 30, 30).part(rows, "val")
    with pytest.raises(ValueError, match="of the class 'class 0' there are 20 rows"):
        Parting(21).part(rows, "shots")
    with pytest.raises(ValueError, match=r"data\.shots is 0"):
        Parting(0)
    with pytest.raises(BadRow, match=r"is no label, but 1\.5"):
        label_of(Row({"label": 1.5}, Origin("f", 1)), "label")
    assert label_of(Row({"label": 3}, Origin("f", 1)), "label") == "3"
