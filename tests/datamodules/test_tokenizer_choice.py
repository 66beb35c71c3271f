from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from chat_tokenizer import byte_tokenizer
from lightning.pytorch import Trainer

from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import FileSource
from lightllm.datamodules.tokenizer_choice import load_chosen, trained_tokenizer
from lightllm.datamodules.train_tokenizer import TrainTokenizer


def trainer_of(**module: Any) -> Trainer:
    return cast(Trainer, SimpleNamespace(lightning_module=SimpleNamespace(**module)))


def test_named_tokenizer_and_that_of_the_network(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    named = load_chosen(str(tmp_path), None)
    of_network = load_chosen(None, trainer_of(tokenizer_source=str(tmp_path)))
    assert named("ü")["input_ids"] == of_network("ü")["input_ids"] == [256, *named("ü")["input_ids"][1:]]


@pytest.mark.parametrize("trainer", [None, trainer_of(tokenizer_source=None), trainer_of()])
def test_no_tokenizer_anywhere(trainer: Trainer | None) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer: .* name one .data.tokenizer., or have one trained"):
        load_chosen(None, trainer)


def test_tokenizer_is_trained_once_on_the_texts_of_good_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "some words"}\n{broken\n{"text": ""}\n{"text": "more words"}\n')
    read: list[str] = []

    def texts(row: Row) -> list[str]:
        if not row.values["text"]:
            raise BadRow(row.origin, "empty")
        read.append(row.values["text"])
        return [row.values["text"]]

    sources = [FileSource(str(file))]
    first = trained_tokenizer(TrainTokenizer(265), sources, tmp_path / "cache", texts)
    again = trained_tokenizer(TrainTokenizer(265), sources, tmp_path / "cache", texts)
    assert read == ["some words", "more words"]
    assert first("words")["input_ids"] == again("words")["input_ids"]
    trained_tokenizer(TrainTokenizer(266), sources, tmp_path / "cache", texts)
    file.write_text('{"text": "other words"}\n')
    trained_tokenizer(TrainTokenizer(265), sources, tmp_path / "cache", texts)
    assert read[2:] == ["some words", "more words", "other words"]
