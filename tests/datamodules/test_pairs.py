from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import wordpiece_tokenizer

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.datamodules import Batches, PairData, Reading
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.modules.text_groups import text_groups

ROWS = [
    {"a": f"w{index % 10} ab", "b": f"w{index % 10} cd ef gh", "c": "no", "score": index / 23, "kind": "xy"[index % 2]}
    for index in range(24)
]


def data(folder: Path, **fields: Any) -> PairData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = PairData(
        str(path),
        tokenizer=wordpiece_tokenizer(),
        reading=Reading(cache=str(folder / "cache"), processes=1, val_fraction=0.25),
        **({"max_length": 16, "batches": Batches(mode="sorted", documents=5), "fields": ["a", "b"]} | fields),
    )
    made.prepare_data()
    made.setup("fit")
    return made


def texts(made: PairData, batch: TextBatch) -> dict[int, str]:
    return {
        document: made.loaded_tokenizer.decode(batch["input_ids"][batch["document_ids"] == document])
        for document in batch["document_ids"].unique().tolist()
        if document != PADDING_DOCUMENT
    }


@pytest.mark.parametrize("fields", [["a"], ["a", "b"], ["b", "a", "c"]])
@pytest.mark.parametrize("mode", ["packed", "sorted"])
def test_texts_of_a_row_are_whole_and_in_one_batch(tmp_path: Path, fields: list[str], mode: Any) -> None:
    made = data(tmp_path, fields=fields, batches=Batches(mode=mode, documents=5))
    tokenizer, seen = made.loaded_tokenizer, []
    for batch in made.train_dataloader():
        assert text_groups(batch).size == len(fields)
        found = texts(made, batch)
        for first in range(min(found), max(found) + 1, len(fields)):
            if first not in found:
                continue
            row = ROWS[made.train_documents.origin(first).line - 1]
            seen.append(row)
            for column, name in enumerate(fields):
                assert found[first + column] == tokenizer.decode(tokenizer(row[name])["input_ids"])
    assert len(seen) >= 15


def test_texts_are_cut_and_keep_their_end(tmp_path: Path) -> None:
    made = data(tmp_path, max_length=5)
    for batch in made.train_dataloader():
        assert batch["input_ids"].shape[1] == 5
        inside = batch["document_ids"] != PADDING_DOCUMENT
        assert (batch["input_ids"][torch.arange(len(inside)), inside.sum(1) - 1] == 3).all()


def test_scores_are_levels(tmp_path: Path) -> None:
    made = data(tmp_path, score_field="score")
    for batch in made.train_dataloader():
        levels = text_groups(batch).levels.tolist()
        firsts = sorted({document for document in batch["document_ids"].unique().tolist() if document % 2 == 0})
        for first, level in zip([one for one in firsts if one >= 0], levels, strict=True):
            score = ROWS[made.train_documents.origin(first).line - 1]["score"]
            assert abs((level - 1) / 78 - score) < 0.5 / 78 + 1e-6  # type: ignore[operator]
    row = Row({"a": "x", "b": "y", "score": 3}, Origin("f", 1))
    with pytest.raises(BadRow, match=r"is no number in \[0.0, 1.0\], but 3"):
        made.encode(row)


def test_pairs_by_label_share_no_text_between_splits(tmp_path: Path) -> None:
    made = data(tmp_path, fields=["b"], label_field="kind")
    assert made.num_texts == 2
    sides = []
    for loader in (made.train_dataloader(), made.val_dataloader()):
        lines = set()
        for batch in loader:
            assert not isinstance(batch, list)
            for first in [one for one in batch["document_ids"].unique().tolist() if one >= 0 and one % 2 == 0]:
                split = "train" if loader is made.train_dataloader() else "val"
                lines.add(made.documents[split].origin(first).line)
        sides.append(lines)
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fields": []}, r"data\.fields is empty"),
        ({"fields": ["a", "b"], "label_field": "kind"}, "name the text's"),
        ({"fields": ["a"], "score_field": "score"}, "name two"),
        ({"fields": ["a"], "label_field": "kind", "partners": 0}, r"data\.partners is 0"),
        ({"score_field": "score", "score_range": (1.0, 1.0)}, r"data\.score_range is \[1.0, 1.0\]"),
    ],
)
def test_fields_that_make_no_pairs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairData("pydoc-preference", **fields)
