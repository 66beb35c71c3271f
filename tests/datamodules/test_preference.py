from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import pytest
from chat_tokenizer import byte_tokenizer

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT
from lightllm.datamodules.base import Batches
from lightllm.datamodules.preference import PreferenceData, parse_preference
from lightllm.datamodules.preparation import Reading
from lightllm.datamodules.pydoc_rows import chat_rows, preference_rows
from lightllm.datamodules.rows import BadRow, Origin, Row

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Good"}
BAD = {"role": "assistant", "content": "Bad"}
MORE = {"role": "user", "content": "More"}


def row(**values: Any) -> Row:
    return Row(values, Origin("pairs.jsonl", 3))


def preference_data(**fields: Any) -> PreferenceData:
    data = PreferenceData("pairs.jsonl", **fields)
    data.tokenizer = byte_tokenizer()
    data.adapt_tokenizer(data.tokenizer)
    return data


def said(data: PreferenceData, row: Row) -> list[tuple[str, str]]:
    """Of each document, the text before its first target and the targets."""
    tokenizer = data.loaded_tokenizer
    pairs = []
    for document in data.encode(row):
        first = list(document.targets).index(True)
        targets = [token for token, flag in zip(document.input_ids, document.targets, strict=True) if flag]
        pairs.append((tokenizer.decode(list(document.input_ids)[:first]), tokenizer.decode(targets)))
    return pairs


HEAD = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Hi", "chosen": "Good", "rejected": "Bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_a_row_is_a_chosen_and_a_rejected_document(values: dict[str, Any]) -> None:
    data = preference_data()
    assert said(data, row(**values)) == [(HEAD, "Good<|im_end|>"), (HEAD, "Bad<|im_end|>")]
    assert len(data.encode(row(**values))) == PreferenceData.documents_per_row


def test_shared_turns_of_the_assistant_are_no_targets() -> None:
    head = [USER, GOOD, MORE]
    for values in (
        {"chosen": [*head, GOOD], "rejected": [*head, BAD]},
        {"prompt": head, "chosen": "Good", "rejected": "Bad"},
    ):
        before = HEAD + "Good<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        assert said(preference_data(), row(**values)) == [(before, "Good<|im_end|>"), (before, "Bad<|im_end|>")]


def test_turns_after_the_first_difference_are_targets_where_the_assistant_says_them() -> None:
    pair = {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, BAD]}
    chosen, rejected = said(preference_data(), row(**pair))
    assert chosen == (HEAD, "Good<|im_end|>Good<|im_end|>")
    assert rejected == (HEAD, "Bad<|im_end|>")


def test_system_message_is_put_in_front_and_shared() -> None:
    data = preference_data(system="Be kind.")
    chosen, rejected = said(data, row(prompt="Hi", chosen="Good", rejected="Bad"))
    assert chosen[0] == rejected[0] == "<|im_start|>system\nBe kind.<|im_end|>\n" + HEAD


def test_prompt_length_counts_shared_messages() -> None:
    assert parse_preference({"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}).prompt_length == 1
    assert parse_preference({"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}, "Be kind.").prompt_length == 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "Hi", "chosen": "Good"}, "no field 'rejected'"),
        ({"prompt": "Hi", "rejected": "Good"}, "no field 'chosen'"),
        ({"chosen": "Good", "rejected": "Bad"}, "'chosen' is a string, so that the row needs a field 'prompt'"),
        ({"prompt": "Hi", "chosen": "Good", "rejected": "Good"}, "the same: nothing to prefer"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "the same: nothing to prefer"),
        ({"prompt": "Hi", "chosen": "Good", "rejected": " "}, "field 'rejected' is empty"),
        ({"prompt": "", "chosen": "Good", "rejected": "Bad"}, "field 'prompt' is empty"),
        ({"prompt": 3, "chosen": "Good", "rejected": "Bad"}, "field 'prompt' is a number"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "chosen: wrong role order: message 1 (assistant)"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected: no assistant message"),
        ({"chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "message 1 differs"),
        ({"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "message 3 differs"),
        ({"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD]}, "begin alike and one goes on"),
    ],
)
def test_bad_row_is_named(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=r"^pairs.jsonl:3: ") as error:
        preference_data().encode(row(**values))
    assert reason in error.value.reason


def test_answers_that_a_template_makes_alike_are_refused() -> None:
    data = preference_data(chat_template="{% for m in messages %}{{ m.content | trim }}\n{% endfor %}")
    with pytest.raises(BadRow, match="the same once rendered"):
        data.encode(row(prompt="Hi", chosen="Good", rejected="Good "))


def test_pairs_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        preference_data().report_rows("train", row(prompt="Hi", chosen="Good", rejected="Bad"), 1200)
    assert caplog.messages == ["train: preference pairs, 1,200 rows"]


def test_offline_pairs_are_right_and_wrong_answers_to_the_same_question() -> None:
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in chat_rows()}
    pairs = preference_rows()
    assert len(pairs) == len(answers) > 1000
    assert all(answers[pair["prompt"]] == pair["chosen"] != pair["rejected"] for pair in pairs)
    assert {pair["rejected"] for pair in pairs} <= set(answers.values())
    preference_rows.cache_clear()
    assert preference_rows() == pairs


@pytest.mark.parametrize("mode", ["packed", "sorted"])
def test_both_documents_of_a_pair_are_in_one_batch(tmp_path: Path, mode: Literal["packed", "sorted"]) -> None:
    pairs = [{"prompt": "Hi" * (n % 7 + 1), "chosen": "a" * (n + 1), "rejected": "b" * (40 - n)} for n in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = PreferenceData(
        str(file),
        str(file),
        tokenizer=byte_tokenizer(),
        max_length=128,
        batches=Batches(mode=mode, tokens=512),
        reading=Reading(cache=str(tmp_path / "cache")),
    )
    data.prepare_data()
    data.setup("fit")
    tokenizer = data.loaded_tokenizer
    seen: list[int] = []
    num_batches = 0
    for batch in data.train_dataloader():
        num_batches += 1
        ids = [one for one in batch["document_ids"].unique().tolist() if one != PADDING_DOCUMENT]
        assert ids == sorted(one for pair in {one // 2 for one in ids} for one in (2 * pair, 2 * pair + 1))
        for one in ids:
            labels = batch["labels"][batch["document_ids"] == one]
            answer = tokenizer.decode(labels[labels != IGNORE_INDEX])
            assert answer == pairs[one // 2]["rejected" if one % 2 else "chosen"] + "<|im_end|>"
        seen += ids
    assert sorted(seen) == list(range(80))
    assert num_batches > 5


def test_offline_pairs_are_a_source(tmp_path: Path) -> None:
    reading = Reading(cache=str(tmp_path / "cache"), limit=20)
    data = PreferenceData("pydoc-preference", tokenizer=byte_tokenizer(), max_length=2048, reading=reading)
    data.prepare_data()
    data.setup("fit")
    documents = data.train_documents
    assert documents is not None
    assert len(documents) == 2 * 19  # and one pair held out
