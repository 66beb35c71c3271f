from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import wordpiece_tokenizer

from lightllm.batch import IGNORE_INDEX
from lightllm.datamodules import Batches, Reading, SentencePairData


def data(folder: Path, **fields: Any) -> SentencePairData:
    path = folder / "texts.jsonl"
    texts = [" ".join(f"w{d} w{s}." for s in range(10)) for d in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    reading = {"cache": str(folder / "cache"), "processes": 1, "val_fraction": 0.25} | fields.pop("reading", {})
    made = SentencePairData(
        str(path),
        tokenizer=wordpiece_tokenizer(),
        words=2,
        reading=Reading(**reading),
        **({"max_length": 16, "batches": Batches(mode="sorted", tokens=64)} | fields),
    )
    made.prepare_data()
    made.setup("fit")
    return made


def test_a_pair_is_a_document_whose_one_label_is_its_class(tmp_path: Path) -> None:
    made = data(tmp_path)
    tokenizer = made.loaded_tokenizer
    classes = []
    for batch in made.train_dataloader():
        for row in range(len(batch["input_ids"])):
            inside = batch["document_ids"][row] >= 0
            tokens = batch["input_ids"][row][inside]
            first, second, end = tokenizer.decode(tokens).split("[SEP]")
            assert first.startswith("[CLS] w")
            assert end == ""
            labels = batch["labels"][row][inside]
            assert (labels[:-1] == IGNORE_INDEX).all()
            classes.append(int(labels[-1]))
            (d, s), (other, t) = [
                [int(word[1:]) for word in text.split() if word[0] == "w"] for text in (first, second)
            ]
            assert (other == d and t == s + 1) == (classes[-1] == 0)
    assert set(classes) == {0, 1}


def test_whole_documents_are_held_out(tmp_path: Path) -> None:
    made = data(tmp_path)
    lines = {
        split: {documents.origin(int(one)).line for one in documents.examples.flatten()}
        for split, documents in made.documents.items()
    }
    assert len(lines["val"]) == 2
    assert lines["train"] | lines["val"] == set(range(1, 9))
    assert not lines["train"] & lines["val"]
    assert len(made.val_documents) == 18


def test_pairs_that_are_too_long_are_cut_to_the_longest_row(tmp_path: Path) -> None:
    made = data(tmp_path, max_length=7)
    for batch in made.train_dataloader():
        assert batch["input_ids"].shape[1] == 7
        assert ((batch["labels"] != IGNORE_INDEX).sum(1) == 1).all()
        assert ((batch["input_ids"] == 3).sum(1) == 2).all()
    other = data(tmp_path, max_length=9)
    assert torch.cat([batch["input_ids"] for batch in other.train_dataloader()]).shape[1] == 9


def test_what_makes_no_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.words is 0"):
        SentencePairData("pydoc-topics", words=0)
    with pytest.raises(ValueError, match=r"set data\.reading\.streaming to false"):
        data(tmp_path, reading={"streaming": True})


def test_a_tokenizer_is_trained_on_each_passage_once(tmp_path: Path) -> None:
    made = SentencePairData("pydoc-topics", tokenizer=wordpiece_tokenizer())
    (source,) = made._sources("train")
    row, _ = next(source.rows())
    assert list(made.texts(row)) == [row.values["first"]]  # type: ignore[union-attr]
