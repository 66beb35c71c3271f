from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from labelled_texts import labelled_rows, save_labelled
from tiny_encoders import wordpiece_tokenizer

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.datamodules import Batches, ClassificationData, Reading
from lightllm.modules.text_groups import classes_of_texts


def data(folder: Path, rows: list[dict[str, str]] | None = None, **fields: Any) -> ClassificationData:
    made = ClassificationData(
        save_labelled(folder / "rows.jsonl", rows or labelled_rows()),
        tokenizer=wordpiece_tokenizer(),
        reading=Reading(cache=str(folder / "cache"), processes=1),
        **(
            {
                "max_length": 16,
                "batches": Batches(mode="sorted", documents=5),
                "shots": 4,
                "val_rows": 6,
                "test_rows": 9,
            }
            | fields
        ),
    )
    made.prepare_data()
    made.setup("fit")
    return made


def texts(made: ClassificationData, loader: Any) -> dict[str, int]:
    """Decoded texts and the numbers of their classes."""
    found = {}
    for batch in loader:
        classes = classes_of_texts(batch).tolist()
        ids = [one for one in batch["document_ids"].unique().tolist() if one != PADDING_DOCUMENT]
        for document, number in zip(ids, classes, strict=True):
            tokens = batch["input_ids"][batch["document_ids"] == document]
            found[made.loaded_tokenizer.decode(tokens)] = number
    return found


def test_a_text_is_a_whole_document_whose_label_is_its_class(tmp_path: Path) -> None:
    made = data(tmp_path)
    assert made.classes == ["class 0", "class 1", "class 2"]
    train, val, test = (
        texts(made, loader()) for loader in (made.train_dataloader, made.val_dataloader, made.test_dataloader)
    )
    assert Counter(train.values()) == {0: 4, 1: 4, 2: 4}
    assert len(val) <= 6
    assert len(test) <= 9
    for found in (train, val, test):
        for text, number in found.items():
            assert text.startswith("[CLS]")
            assert text.endswith("[SEP]")
            assert f"w{number}" in text


def test_the_rest_is_neither_learned_from_nor_measured_on(tmp_path: Path) -> None:
    made = data(tmp_path)
    rest = made.unlabelled()
    assert len(rest) == 60 - 12 - 6 - 9
    lines = {
        split: {documents.origin(int(one)).line for one in documents.examples.flatten()}
        for split, documents in made.documents.items()
    }
    assert set(lines) == {"train", "val", "test", "rest"}
    assert set.union(*lines.values()) == set(range(1, 61))
    assert sum(map(len, lines.values())) == 60
    with pytest.raises(ValueError, match="no texts are left without a label"):
        data(tmp_path, shots=None).unlabelled()


def test_texts_are_cut_and_keep_end_and_class(tmp_path: Path) -> None:
    made = data(tmp_path, max_length=4)
    batch: TextBatch
    for batch in made.train_dataloader():
        assert batch["input_ids"].shape[1] == 4
        assert (batch["input_ids"][:, -1] == 3).all()
        assert (classes_of_texts(batch) >= 0).all()


def test_one_domain_is_learned_from_and_another_measured(tmp_path: Path) -> None:
    made = data(tmp_path, only={"domain": "x"}, measured_only={"domain": "y"})
    rows = labelled_rows()
    for split, domain in (("train", "x"), ("val", "y"), ("test", "y")):
        documents = made.documents[split]
        origins = [documents.origin(int(one)).line for one in documents.examples.flatten()]
        assert {rows[line - 1]["domain"] for line in origins} == {domain}
    assert len(made.unlabelled()) == 30 - 12
    with pytest.raises(ValueError, match="give a field another value in each"):
        data(tmp_path, only={"domain": "x"}, measured_only={"label": "class 1"})


def test_measured_rows_may_have_a_source_of_their_own(tmp_path: Path) -> None:
    own = save_labelled(tmp_path / "own.jsonl", labelled_rows(3, 4, seed=9))
    made = data(tmp_path, test=own, val_rows=0)
    assert "val" not in made.documents
    assert len(made.documents["test"]) == 12
    assert len(made.unlabelled()) == 60 - 12
    other = save_labelled(tmp_path / "other.jsonl", labelled_rows(4, 4))
    with pytest.raises(ValueError, match="the class 'class 3' is none of"):
        data(tmp_path, test=other)


def test_what_is_no_classification_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two classes are least"):
        data(tmp_path, labelled_rows(1, 30))
    with pytest.raises(ValueError, match=r"data\.reading\.streaming to false"):
        data(tmp_path).__class__("x.jsonl", tokenizer=wordpiece_tokenizer(), reading=Reading(streaming=True))._sources(
            "train"
        )
    with pytest.raises(ValueError, match=r"data\.shots is 0"):
        data(tmp_path, shots=0)
