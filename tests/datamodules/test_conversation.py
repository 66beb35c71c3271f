from __future__ import annotations

import re
from typing import Any

import pytest

from lightllm.datamodules.conversation import (
    ChatFormat,
    Message,
    check_order,
    detect_format,
    parse_conversation,
)

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüß dich 👩‍🚀"},
    {"role": "assistant", "content": "你好"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye."},
]

ROWS: dict[ChatFormat, dict[str, Any]] = {
    "messages": {"messages": MESSAGES, "id": 7},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Grüß dich 👩‍🚀"},
            {"from": "gpt", "value": "你好"},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "Bye."},
        ]
    },
    "prompt_completion": {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
}


@pytest.mark.parametrize("name", ROWS)
def test_formats_mean_the_same_conversation(name: ChatFormat) -> None:
    assert detect_format(ROWS[name]) == name
    conversation = parse_conversation(ROWS[name], name)
    assert conversation.messages == MESSAGES
    assert conversation.assistant_turns == [2, 4]
    assert conversation.tools is None


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add."),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add."),
        ({"instruction": "Add.", "output": "3"}, "Add."),
    ],
)
def test_alpaca_appends_the_input_to_the_instruction(fields: dict[str, Any], question: str) -> None:
    assert detect_format(fields) == "alpaca"
    conversation = parse_conversation(fields, "alpaca")
    assert conversation.messages == [{"role": "user", "content": question}, {"role": "assistant", "content": "3"}]


def test_alpaca_row_may_have_a_system_field() -> None:
    fields = {"instruction": "Add.", "output": "3", "system": "You count."}
    assert parse_conversation(fields, "alpaca", system="Not this.").messages[0] == {
        "role": "system",
        "content": "You count.",
    }


def test_prompt_and_completion_may_be_strings() -> None:
    fields = {"prompt": "1 + 2?", "completion": "3"}
    assert detect_format(fields) == "prompt_completion"
    assert parse_conversation(fields, "prompt_completion").messages == [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "3"},
    ]


def test_messages_win_over_a_prompt_beside_them() -> None:
    assert detect_format({"prompt": "Hi", "messages": MESSAGES}) == "messages"


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"completion": "a"}, "prompt_completion"), ({"instruction": "a"}, "alpaca"), ({"output": "a"}, "alpaca")],
)
def test_detects_the_format_of_a_row_that_lacks_a_field(fields: dict[str, Any], name: ChatFormat) -> None:
    assert detect_format(fields) == name


def test_says_which_fields_are_known_where_none_is_there() -> None:
    with pytest.raises(ValueError, match=r"no chat format has the fields 'text', 'label' .*Alpaca: instruction"):
        detect_format({"text": "a", "label": 1})


@pytest.mark.parametrize("fields", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": [], "rejected": []}])
def test_points_preference_data_to_its_own_class(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="PreferenceData"):
        detect_format(fields)


def test_system_message_is_for_conversations_without_one() -> None:
    row = {"prompt": "Hi", "completion": "Ho"}
    assert parse_conversation(row, "prompt_completion", "Sing.").messages[0]["content"] == "Sing."
    assert parse_conversation(ROWS["messages"], "messages", "Sing.").messages == MESSAGES


def test_content_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "Look: "}, {"type": "text", "text": "é"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Ok"}]}
    assert parse_conversation(row, "messages").messages[0]["content"] == "Look: é"


def test_keeps_tools_their_calls_and_reasoning_and_drops_nulls() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = {
        "messages": [
            {"role": "user", "content": "1 + 1?", "tool_calls": None, "mood": "curious"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"},
            {"role": "assistant", "content": "Two.", "reasoning_content": "It said 2."},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    conversation = parse_conversation(row, "messages")
    assert conversation.messages == [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "It said 2."},
    ]
    assert conversation.tools == row["tools"]
    assert conversation.assistant_turns == [1, 3]


def test_sharegpt_field_may_hold_messages_in_the_other_spelling() -> None:
    assert parse_conversation({"conversations": MESSAGES}, "sharegpt").messages == MESSAGES


USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("messages", {"text": "a"}, "no field 'messages' (it has 'text')"),
        ("messages", {"messages": "a"}, "'messages' is a string, expected a list"),
        ("messages", {"messages": []}, "empty list"),
        ("messages", {"messages": [USER, "b"]}, "message 2 of 'messages' is a string, expected an object"),
        ("messages", {"messages": [{"content": "a"}]}, "message 1 of 'messages' has no field 'role'"),
        ("messages", {"messages": [{"role": "user"}]}, "message 1 of 'messages' has no field 'content'"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": " \n"}]}, "2 of 'messages' (assistant) is e"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": 3}]}, "is a number, expected a string"),
        ("messages", {"messages": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        ("messages", {"messages": [{"role": ["user"], "content": "a"}]}, "unknown role ['user']"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part that is not"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": "add"}, "'tools' is a string, expected a list"),
        ("sharegpt", {"conversations": [{"from": "wizard", "value": "a"}]}, "unknown role 'wizard'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": ""}]}, "message 1 of 'conversations' is empty"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "message 1 of 'conversations' has no field 'value'"),
        ("alpaca", {"instruction": "a"}, "no field 'output'"),
        ("alpaca", {"instruction": "a", "output": ""}, "field 'output' is empty"),
        ("alpaca", {"instruction": 1, "output": "a"}, "field 'instruction' is a number, expected a string"),
        ("alpaca", {"instruction": "a", "input": 1, "output": "a"}, "field 'input' is a number"),
        ("prompt_completion", {"prompt": "a", "completion": None}, "no field 'completion' (it has 'prompt')"),
        ("prompt_completion", {"prompt": " ", "completion": "a"}, "field 'prompt' is empty"),
        ("prompt_completion", {"prompt": {"a": 1}, "completion": "a"}, "'prompt' is an object, expected a list"),
    ],
)
def test_refuses_a_bad_row_and_says_why(name: ChatFormat, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_conversation(fields, name)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("assistant", "message 1 (assistant) begins the conversation, expected system or user"),
        ("user assistant assistant", "message 3 (assistant) follows an assistant message, expected user or tool"),
        ("user user assistant", "message 2 (user) follows a user message, expected assistant"),
        ("system assistant", "message 2 (assistant) follows a system message, expected user"),
        ("user system assistant", "message 2 (system) follows a user message"),
        ("user tool assistant", "message 2 (tool) follows a user message"),
        ("user assistant tool user", "message 4 (user) follows a tool message"),
        ("system user", "no assistant message"),
        ("user assistant user", "the last message is a user one, expected assistant"),
        ("user assistant tool", "the last message is a tool one, expected assistant"),
    ],
)
def test_refuses_roles_in_a_wrong_order(roles: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_order([Message(role=role, content="a") for role in roles.split()])


@pytest.mark.parametrize(
    "roles",
    ["user assistant", "system user assistant user assistant", "user assistant tool tool assistant user assistant"],
)
def test_accepts_roles_in_a_right_order(roles: str) -> None:
    check_order([Message(role=role, content="a") for role in roles.split()])
