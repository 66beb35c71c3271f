"""From the rows of chat data sets to conversations: messages with checked roles, whatever the row looked like.

Four shapes are known:

| format | fields of a row |
| --- | --- |
| `messages` | `messages`: a list of `{"role", "content"}`, as in OpenAI's interface |
| `sharegpt` | `conversations`: a list of `{"from": "human" or "gpt" or "system", "value"}` |
| `prompt_completion` | `prompt` and `completion`: strings, or lists of messages |
| `alpaca` | `instruction` and `output`, optionally `input` and `system`: strings |

Every fault of a row is a `ValueError` that says what is wrong; who reads the row adds where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, cast

from typing_extensions import NotRequired

ChatFormat = Literal["messages", "sharegpt", "prompt_completion", "alpaca"]
"""The shapes of a row that can be named."""

FORMAT_TITLES: dict[ChatFormat, str] = {
    "messages": "messages",
    "sharegpt": "ShareGPT",
    "prompt_completion": "prompt/completion",
    "alpaca": "Alpaca",
}
"""How a format is called in a report."""

_DETECTED_BY: dict[ChatFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
"""Fields of which one is enough to know the format (a bad row may lack the other), in order of precedence."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

_ROLES_AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Which roles may follow a role; `None` stands for the beginning."""

_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Further fields of a message that chat templates read."""


class Message(TypedDict):
    """One turn, as chat templates read it."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]


class Conversation(NamedTuple):
    """Messages in a right order, the last of them an assistant's."""

    messages: list[Message]
    tools: list[Any] | None = None
    """The functions that the assistant may call, as JSON schemas, where the row declares them in a field `tools`."""

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def detect_format(fields: Mapping[str, Any]) -> ChatFormat:
    """The format of a row, by the names of its fields.

    Raises:
        ValueError: The row has no field by which a chat format is known.
    """
    for name, detecting in _DETECTED_BY.items():
        if any(field in fields for field in detecting) and not ("chosen" in fields and name != "messages"):
            return name
    if "chosen" in fields or "rejected" in fields:
        raise ValueError("a row with `chosen` and `rejected` is preference data: read it with PreferenceData")
    known = "; ".join(f"{title}: {', '.join(_DETECTED_BY[name])}" for name, title in FORMAT_TITLES.items())
    raise ValueError(f"no chat format has the fields {_names(fields)} (known are {known})")


def parse_conversation(fields: Mapping[str, Any], format: ChatFormat, system: str | None = None) -> Conversation:
    """The conversation of a row.

    Args:
        fields: the row.
        format: its format.
        system: the content of a system message for a conversation that has none.

    Raises:
        ValueError: A field is missing, empty or of a wrong type, a role is unknown, or the roles' order is wrong.
    """
    messages = with_system(_PARSERS[format](fields), system)
    check_order(messages)
    return Conversation(messages, parse_tools(fields))


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages with a system message in front, unless there is one already or `system` is None."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def parse_tools(fields: Mapping[str, Any]) -> list[Any] | None:
    """The list of function schemas in the field `tools`, None where there is none."""
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"field 'tools' is {_kind(tools)}, expected a list of function schemas")
    return tools or None


def parse_turns(value: object, field: str, role: str) -> list[Message]:
    """Messages from a field that may hold either one text, said by `role`, or a list of messages.

    Raises:
        ValueError: See `parse_conversation`.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"field {field!r} is empty")
        return [{"role": role, "content": value}]
    return _parse_list(value, field, _message)


def check_order(messages: Sequence[Message]) -> None:
    """Refuse roles in an order that no chat has.

    A conversation begins with at most one system message; then user and assistant alternate, with tool messages only
    after an assistant's; it ends with an assistant's message.

    Raises:
        ValueError: The order is another one.
    """
    previous: str | None = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _ROLES_AFTER[previous]:
            where = "begins the conversation" if previous is None else f"follows {_article(previous)} message"
            expected = " or ".join(_ROLES_AFTER[previous])
            raise ValueError(f"wrong role order: message {number} ({role}) {where}, expected {expected}")
        previous = role
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant message: nothing to learn")
    if previous != "assistant":
        raise ValueError(f"wrong role order: the last message is {_article(str(previous))} one, expected assistant")


def _parse_messages(fields: Mapping[str, Any]) -> list[Message]:
    return _parse_list(_required(fields, "messages"), "messages", _message)


def _parse_sharegpt(fields: Mapping[str, Any]) -> list[Message]:
    return _parse_list(_required(fields, "conversations"), "conversations", _sharegpt_message)


def _parse_prompt_completion(fields: Mapping[str, Any]) -> list[Message]:
    prompt = parse_turns(_required(fields, "prompt"), "prompt", "user")
    return prompt + parse_turns(_required(fields, "completion"), "completion", "assistant")


def _parse_alpaca(fields: Mapping[str, Any]) -> list[Message]:
    instruction = _text(_required(fields, "instruction"), "field 'instruction'")
    context = fields.get("input")
    if context is not None and not isinstance(context, str):
        raise ValueError(f"field 'input' is {_kind(context)}, expected a string")
    if context and context.strip():
        instruction = f"{instruction}\n\n{context}"
    answer = _text(_required(fields, "output"), "field 'output'")
    messages: list[Message] = [
        {"role": "user", "content": instruction},
        {"role": "assistant", "content": answer},
    ]
    system = fields.get("system")
    return with_system(messages, _text(system, "field 'system'") if system else None)


_PARSERS: dict[ChatFormat, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
}


def _parse_list(value: object, field: str, parse: Callable[[Mapping[str, Any], str], Message]) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"field {field!r} is {_kind(value)}, expected a list of messages")
    if not value:
        raise ValueError(f"field {field!r} is an empty list, expected messages")
    messages = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, Mapping):
            raise ValueError(f"message {number} of {field!r} is {_kind(entry)}, expected an object")
        messages.append(parse(entry, f"message {number} of {field!r}"))
    return messages


def _message(entry: Mapping[str, Any], where: str) -> Message:
    role = _required(entry, "role", where)
    if role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"{where} has the unknown role {role!r} (known are system, user, assistant, tool)")
    # Tables keep every field for every message, so that a field that a message does not have is a null.
    kept = {name: entry[name] for name in _KEPT if entry.get(name) is not None}
    calls = bool(kept.get("tool_calls"))
    content = entry.get("content") if calls else _required(entry, "content", where)
    content = "" if content is None else _joined(content, where)
    if not content.strip() and not calls:
        raise ValueError(f"{where} ({role}) is empty")
    return cast(Message, {"role": role, "content": content, **kept})


def _sharegpt_message(entry: Mapping[str, Any], where: str) -> Message:
    if "role" in entry and "from" not in entry:  # the field's name is ShareGPT's, its messages are OpenAI's
        return _message(entry, where)
    speaker = _required(entry, "from", where)
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise ValueError(f"{where} is from the unknown role {speaker!r} (known are {', '.join(_SHAREGPT_ROLES)})")
    return {"role": _SHAREGPT_ROLES[speaker], "content": _text(_required(entry, "value", where), where)}


def _joined(content: object, where: str) -> str:
    """A message's text, whether it is one string or a list of text parts (joined without a separator)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content of {where} is {_kind(content)}, expected a string or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"the content of {where} has a part that is not {{'type': 'text', 'text': …}}")
        texts.append(part["text"])
    return "".join(texts)


def _required(fields: Mapping[str, Any], name: str, where: str = "the row") -> Any:
    if fields.get(name) is None:
        raise ValueError(f"{where} has no field {name!r} (it has {_names(fields)})")
    return fields[name]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_kind(value)}, expected a string")
    if not value.strip():
        raise ValueError(f"{where} is empty")
    return value


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name, value in fields.items() if value is not None) or "none"


def _kind(value: object) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeio" else f"a {role}"
