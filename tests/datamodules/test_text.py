from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizer import byte_tokenizer
from data_run import ready, text_data, write_rows
from tokenizers import processors

from lightllm.batch import IGNORE_INDEX, Document, pad_documents
from lightllm.datamodules import Batches, Reading, TextData
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.text import TextEncoder, text_of


def row(begins: bool = True, ends: bool = True, **values: Any) -> Row:
    return Row(values, Origin("a.jsonl", 4), begins, ends)


def test_documents_have_a_begin_an_end_and_targets_throughout() -> None:
    encode = TextEncoder(byte_tokenizer(), "body")
    ((ids, targets, _),) = encode(row(body="hé", text="other"))
    assert byte_tokenizer().decode(list(ids)) == "<s>hé</s>"
    assert targets == [True] * 5
    parts = [encode(row(begins, ends, body="ab")) for begins, ends in ((True, False), (False, False), (False, True))]
    whole = [token for ((ids, _, _),) in parts for token in ids]
    assert byte_tokenizer().decode(whole) == "<s>ababab</s>"


def test_an_encoder_reads_the_last_token_too() -> None:
    ((ids, targets, _),) = TextEncoder(byte_tokenizer(), "text", reads_end=True)(row(text="ab"))
    batch = pad_documents([Document(ids, targets, 0)])
    assert byte_tokenizer().decode(batch["input_ids"][0]) == "<s>ab</s>"
    assert batch["labels"][0].tolist() == [*ids[1:4], IGNORE_INDEX]


def test_special_tokens_are_those_that_the_tokenizer_puts_there() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A <|im_end|>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")],
    )
    ((ids, _, _),) = TextEncoder(tokenizer, "text")(row(text="ab"))
    assert tokenizer.decode(list(ids)) == "<|im_start|>ab<|im_end|>"


def test_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token, so that documents would have no end"):
        TextEncoder(tokenizer, "text")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"body": "x", "n": 1}, "no field 'text' (it has 'body', 'n')"),
        ({}, "no field 'text' (it has none)"),
        ({"text": None}, "the field 'text' is no text, but None"),
        ({"text": ["a"]}, "the field 'text' is no text, but ['a']"),
        ({"text": " \n"}, "the field 'text' is empty"),
    ],
)
def test_rows_without_text_are_bad(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        text_of(row(**values), "text")
    assert str(error.value) == f"a.jsonl:4: {reason}"


@pytest.mark.parametrize("batches", [Batches(tokens=128), Batches("sorted", tokens=128), Batches(documents=3)])
def test_an_epoch_is_the_files_whatever_the_batches(tmp_path: Path, batches: Batches) -> None:
    data = ready(text_data(tmp_path, batches))
    tokenizer = data.loaded_tokenizer
    pieces: dict[int, list[str]] = {}
    for batch in data.train_dataloader():
        for ids, labels, positions, documents in zip(*batch.values(), strict=True):  # type: ignore[call-overload]
            begins = (positions == 0).nonzero().flatten().tolist()
            for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
                here = labels[begin:end] != IGNORE_INDEX
                if here.any():
                    assert torch.equal(ids[begin:end][here][1:], labels[begin:end][here][:-1])
                    text = tokenizer.decode(labels[begin:end][here])
                    pieces.setdefault(int(documents[begin]), []).append(text)
    lines = [line for file in write_rows(tmp_path) for line in Path(file).read_text().splitlines()]
    assert len(pieces) == len(lines) == len(data.train_documents)
    for document, texts in pieces.items():
        path, line = data.describe_document("train", document).rsplit(":", 1)
        text = json.loads(Path(path).read_text().splitlines()[int(line) - 1])["text"] + "</s>"
        assert sorted("".join(texts)) == sorted(text)
        assert all(piece in text for piece in texts)
        assert len(texts) >= -(-(len(text) - len("</s>") + 1) // 32)


def test_prose_is_packed_without_padding_and_ends_once(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a dark and stormy night.\n\n" * 2000)
    reading = Reading(cache=str(tmp_path / "cache"), val_fraction=0.2)
    data = TextData(str(tmp_path / "book.txt"), tokenizer=byte_tokenizer(), max_length=64, reading=reading)
    ready(data)
    assert data.statistics["train"].padding_share < 0.01
    assert len(data.val_documents) == 1
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert int((labels == data.loaded_tokenizer.eos_token_id).sum()) == 1
    assert int((labels != IGNORE_INDEX).sum()) == 33 * 2000 + 1 - (len(data.train_documents) + 1 - 1)
