from __future__ import annotations

from pathlib import Path

import pytest
from chat_tokenizer import byte_tokenizer
from data_run import targets

from lightllm.batch import IGNORE_INDEX
from lightllm.datamodules import Batches, ChatData, DocumentData, PydocData, Reading, TextData, TrainTokenizer


def ready(data: DocumentData) -> DocumentData:
    data.prepare_data()
    data.setup("fit")
    return data


def reading(folder: Path) -> Reading:
    return Reading(cache=str(folder), limit=120)


def test_chat_is_what_chat_data_makes_of_it(tmp_path: Path) -> None:
    fields = {"max_length": 256, "batches": Batches("sorted", 4096), "reading": reading(tmp_path)}
    ours = ready(PydocData(tokenizer=byte_tokenizer(), **fields))  # type: ignore[arg-type]
    theirs = ready(ChatData("pydoc-chat", tokenizer=byte_tokenizer(), **fields))  # type: ignore[arg-type]
    assert targets(ours.train_dataloader()) == targets(theirs.train_dataloader())
    assert targets(ours.val_dataloader()) == targets(theirs.val_dataloader())
    batch = next(iter(ours.train_dataloader()))
    said = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    heard = ours.loaded_tokenizer.decode(batch["input_ids"][0])
    assert "standard library" in heard or "Python" in heard or "What is" in heard
    assert len(said) < (batch["document_ids"][0] >= 0).sum()
    assert ours.statistics["train"].num_truncated > 0


def test_prose_is_what_text_data_makes_of_it_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    fields = {"tokenizer": TrainTokenizer(400), "max_length": 64, "reading": Reading(cache=str(tmp_path), limit=10)}
    ours = ready(PydocData(kind="prose", **fields))  # type: ignore[arg-type]
    theirs = ready(TextData("pydoc-topics", **fields))  # type: ignore[arg-type]
    assert len(ours.loaded_tokenizer) == 400
    assert targets(ours.train_dataloader()) == targets(theirs.train_dataloader())
    assert ours.statistics["train"].padding_share < 0.02
    assert ours.statistics["train"].num_truncated == 0


def test_held_out_rows_are_the_same_whatever_the_seed(tmp_path: Path) -> None:
    held_out = []
    for seed in (0, 1):
        data = ready(PydocData(tokenizer=byte_tokenizer(), seed=seed, reading=reading(tmp_path)))
        train, val = (set(documents.examples.ravel().tolist()) for documents in data.documents.values())
        assert not train & val
        assert len(train | val) == 120
        held_out.append(val)
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 6


@pytest.mark.parametrize("kind", ["chat", "prose"])
def test_training_source_can_be_named(tmp_path: Path, kind: str) -> None:
    assert PydocData(kind=kind).train == {"chat": "pydoc-chat", "prose": "pydoc-topics"}[kind]  # type: ignore[arg-type]
    assert PydocData("my.jsonl", kind=kind).train == "my.jsonl"  # type: ignore[arg-type]
