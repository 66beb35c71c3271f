from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lightllm.datamodules.files import Cursor
from lightllm.datamodules.label_pair_source import LabelPairSource
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import FileSource


def source(folder: Path, rows: list[dict[str, Any]], seed: int = 0) -> LabelPairSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LabelPairSource(FileSource(str(path)), "text", "kind", seed)


ROWS = [{"text": f"text {index}", "kind": "abc"[index % 3]} for index in range(25)]


def test_each_text_is_once_the_anchor_of_another_of_its_label(tmp_path: Path) -> None:
    found = [row for row, _ in source(tmp_path, ROWS).rows()]
    kinds = {row["text"]: row["kind"] for row in ROWS}
    assert all(isinstance(row, Row) for row in found)
    anchors = [row.values["anchor"] for row in found if isinstance(row, Row)]
    assert sorted(anchors) == sorted(kinds)
    groups: dict[int, set[str]] = defaultdict(set)
    for row in found:
        assert isinstance(row, Row)
        anchor, positive = row.values["anchor"], row.values["positive"]
        assert anchor != positive
        assert kinds[anchor] == kinds[positive]
        groups[row.origin.line] |= {anchor, positive}
    assert sum(len(group) for group in groups.values()) == 25, "no text is in two groups"
    assert {len(group) for group in groups.values()} == {2, 3}
    lines = [row.origin.line for row in found]
    assert all(lines.index(line) + lines.count(line) - 1 == len(lines) - 1 - lines[::-1].index(line) for line in lines)


@pytest.mark.parametrize("partners", [2, 3, 30])
def test_each_text_has_several_partners_of_its_group(tmp_path: Path, partners: int) -> None:
    made = source(tmp_path, ROWS)
    made.partners = partners
    found = [row for row, _ in made.rows()]
    groups: dict[int, set[str]] = defaultdict(set)
    pairs: list[tuple[str, str]] = []
    for row in found:
        assert isinstance(row, Row)
        pairs.append((row.values["anchor"], row.values["positive"]))
        groups[row.origin.line] |= set(pairs[-1])
    assert len(set(pairs)) == len(pairs)
    assert all(anchor != positive for anchor, positive in pairs)
    assert sum(len(group) for group in groups.values()) == 25
    for group in groups.values():
        for text in group:
            assert sum(anchor == text for anchor, _ in pairs) == min(partners, len(group) - 1) >= 1
    assert max(map(len, groups.values())) <= partners + 2


def test_pairs_are_those_of_the_seed_from_any_row_on(tmp_path: Path) -> None:
    made = source(tmp_path, ROWS)
    whole = [row for row, _ in made.rows()]
    assert [row for row, _ in made.rows(Cursor(4, 1))] == whole[4:]
    assert [row for row, _ in source(tmp_path, ROWS, seed=1).rows()] != whole
    assert made.digest() != source(tmp_path, ROWS, seed=1).digest()


def test_rows_without_a_label_or_a_partner_are_bad(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "kind": "x"}, {"text": "c", "kind": 3}, {"kind": 3}, {"text": "d", "kind": 3}]
    found = [row for row, _ in source(tmp_path, rows).rows()]
    bad = {row.origin.line: row.reason for row in found if isinstance(row, BadRow)}
    assert bad[1] == "the field 'kind' is no label, but None"
    assert bad[2] == "the only row with the label 'x': there is nothing to pair it with"
    assert 4 in bad
    assert len(found) - len(bad) == 2
