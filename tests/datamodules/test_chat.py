from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from chat_tokenizer import CHATML, byte_tokenizer

from lightllm.batch import IGNORE_INDEX, Document
from lightllm.datamodules.chat import ChatData
from lightllm.datamodules.preparation import Reading
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.models.chat_template import DEFAULT_CHAT_TEMPLATE

TURNS = [
    {"role": "user", "content": "Hi 👋"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]


def row(**values: Any) -> Row:
    return Row(values, Origin("chats.jsonl", 7))


def encoded(data: ChatData, row: Row) -> tuple[str, list[str]]:
    """A row's text, and the runs of targets in it."""
    tokenizer = data.loaded_tokenizer
    (document,) = data.encode(row)
    runs = []
    for index, flag in enumerate(document.targets):
        if flag:
            if index == 0 or not document.targets[index - 1]:
                runs.append([])
            runs[-1].append(document.input_ids[index])
    return tokenizer.decode(list(document.input_ids)), [tokenizer.decode(run) for run in runs]


def chat_data(template: str | None = CHATML, **fields: Any) -> ChatData:
    data = ChatData("chats.jsonl", **fields)
    data.tokenizer = byte_tokenizer(template)
    data.adapt_tokenizer(data.tokenizer)
    return data


@pytest.mark.parametrize(
    ("loss_on", "targets"),
    [("assistant", ["Ho<|im_end|>", "Bye<|im_end|>"]), ("last", ["Bye<|im_end|>"])],
)
def test_targets_are_what_the_field_says(loss_on: Literal["assistant", "last"], targets: list[str]) -> None:
    text, runs = encoded(chat_data(loss_on=loss_on), row(messages=TURNS))
    assert text == (
        "<|im_start|>user\nHi 👋<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBye<|im_end|>\n"
    )
    assert runs == targets


def test_all_of_the_text_may_be_learned() -> None:
    text, runs = encoded(chat_data(loss_on="all"), row(messages=TURNS))
    assert runs == [text]


def test_every_format_gives_the_same_document() -> None:
    rows = [
        row(messages=TURNS[:2]),
        row(conversations=[{"from": "human", "value": "Hi 👋"}, {"from": "gpt", "value": "Ho"}]),
        row(prompt="Hi 👋", completion="Ho"),
        row(prompt=TURNS[:1], completion=TURNS[1:2]),
        row(instruction="Hi 👋", input="", output="Ho"),
    ]
    data = chat_data()
    first, *others = [data.encode(row) for row in rows]
    assert all(other == first for other in others)
    assert isinstance(first[0], Document)


def test_format_can_be_said() -> None:
    both = row(instruction="Not this", output="Not this", prompt="Hi", completion="Ho")
    assert encoded(chat_data(format="prompt_completion"), both)[1] == ["Ho<|im_end|>"]
    assert encoded(chat_data(format="alpaca"), both)[1] == ["Not this<|im_end|>"]


def test_format_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chat_data().report_rows("train", row(instruction="a", output="b"), 2201)
        chat_data(format="messages").report_rows("val", row(instruction="a", output="b"), None)
    assert caplog.messages == ["train: Alpaca format, 2,201 rows", "val: messages format, streamed"]


def test_system_message_is_put_in_front() -> None:
    text, runs = encoded(chat_data(system="Be kind."), row(messages=TURNS[:2]))
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi")
    assert runs == ["Ho<|im_end|>"]


def test_tokenizer_without_a_template_gets_the_default_and_no_second_beginning() -> None:
    data = chat_data(template=None)
    text, runs = encoded(data, row(messages=TURNS))
    assert text == "<s>User:\nHi 👋\nAssistant:\nHo</s>\nUser:\nAnd?\nAssistant:\nBye</s>\n"
    assert runs == ["Ho</s>", "Bye</s>"]
    assert data.loaded_tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE


def test_template_can_be_said() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}[assistant]{% endif %}"
    data = chat_data(chat_template=template + prompt)
    text, runs = encoded(data, row(messages=TURNS[:2]))
    assert text == "[user]Hi 👋</s>[assistant]Ho</s>"
    assert runs == ["Ho</s>"]
    assert data.loaded_tokenizer.chat_template == template + prompt


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": "Hi"}, "no chat format has the fields 'text'"),
        ({"messages": TURNS[1:]}, "message 1 (assistant) begins the conversation"),
        ({"prompt": "Hi", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "Hi", "completion": json.loads('"\\ud83d"')}, "surrogate pair"),
    ],
)
def test_bad_row_is_named(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=r"^chats.jsonl:7: ") as error:
        chat_data().encode(row(**values))
    assert reason in error.value.reason


def test_from_a_file_to_batches(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": TURNS[:2]}, {"messages": TURNS}, {"prompt": "Hi", "completion": "Ho"}] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ChatData(str(file), str(file), tokenizer=byte_tokenizer(), reading=Reading(cache=str(tmp_path / "cache")))
    data.prepare_data()
    data.setup("fit")
    tokenizer = data.loaded_tokenizer
    answers: dict[int, str] = {}
    for batch in data.train_dataloader():
        targets = batch["labels"] != IGNORE_INDEX
        for document in batch["document_ids"][targets].unique().tolist():
            here = targets & (batch["document_ids"] == document)
            answers[document] = tokenizer.decode(batch["labels"][here])
            # What is to be predicted is what comes next, where something does.
            follows = here[:, :-1] & here[:, 1:]
            assert torch.equal(batch["labels"][:, :-1][follows], batch["input_ids"][:, 1:][follows])
    says = ["Ho<|im_end|>", "Ho<|im_end|>Bye<|im_end|>", "Ho<|im_end|>"] * 3
    assert answers == dict(enumerate(says))
    assert data.describe_document("train", 4) == f"{file}:5"


def test_bad_rows_stop_before_training_or_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": TURNS[:2]}, {"messages": TURNS[1:]}, {"messages": TURNS}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = str(tmp_path / "cache")
    data = ChatData(str(file), str(file), tokenizer=byte_tokenizer(), reading=Reading(cache=cache))
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: wrong role order: message 1 (assistant)")):
        data.prepare_data()
    reading = Reading(cache=cache, bad_rows="skip")
    data = ChatData(str(file), str(file), tokenizer=byte_tokenizer(), reading=reading)
    data.prepare_data()
    data.setup("fit")
    documents = data.train_documents
    assert documents is not None
    assert [str(documents.origin(index)) for index in range(len(documents))] == [f"{file}:1", f"{file}:3"]
