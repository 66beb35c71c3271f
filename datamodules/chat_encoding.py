"""From conversations to token ids, and which of them are said by the assistant.

The text of a conversation is what the tokenizer's chat template renders, tokenised as a whole, so that the ids are
those of `apply_chat_template`. Which characters the assistant says is known in one of two ways: the template marks
them with `{% generation %}`, or, for any other template, a turn is what the rendering of the messages up to it adds
to the prompt that asks for it. The tokenizer's offsets carry characters over to tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightllm.datamodules.conversation import Conversation, Message
from lightllm.models.chat_template import DEFAULT_CHAT_TEMPLATE, with_chat_template

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_SURROGATE = re.compile("[\ud800-\udfff]")

_Span = tuple[int, int]
"""Begin and end (exclusive), in characters of the rendered text."""


class EncodedChat(NamedTuple):
    """Token ids of a conversation."""

    input_ids: list[int]
    targets: list[bool]
    """For each token: is it said by the assistant?"""


def read_chat_template(template: str) -> str:
    """A chat template given as Jinja text or as the path of a file that holds it.

    Raises:
        ValueError: It is neither.
    """
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template={template!r} is neither Jinja text (it has no '{{{{' or '{{%') nor a file")
    return path.read_text(encoding="utf-8")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Give the tokenizer the template that conversations are to be rendered with, so that it is saved with it.

    Args:
        tokenizer: changed in place.
        template: Jinja text or a file's path; None keeps the tokenizer's own, or takes the default if it has none.

    Raises:
        ValueError: The template can't be read or is not valid Jinja; the tokenizer is one without offsets (a slow
            one), or has no end-of-sequence token, which the default template ends an answer with.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for, so that the assistant's "
            "can't be told from the others: use a tokenizer that is backed by a tokenizer.json"
        )
    if template is not None:
        tokenizer.chat_template = read_chat_template(template)
    with_chat_template(tokenizer)
    if tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE and tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has neither a chat template nor an end-of-sequence token, so that no answer would ever "
            "end: give `chat_template`, or a tokenizer with an eos_token"
        )
    try:
        _render(tokenizer, [{"role": "user", "content": "?"}], None, ask=True)
    except ValueError as error:
        if template is not None:
            raise ValueError(f"chat_template={template!r}: {error}") from error


class ChatEncoder:
    """Tokenises conversations with a tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer that has a chat template (see `set_chat_template`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)
        special = frozenset(tokenizer.all_special_ids)
        bos = tokenizer.bos_token_id
        self._may_end_turn = special - {bos} if bos != tokenizer.eos_token_id else special

    def __call__(self, conversation: Conversation, turns: Sequence[int]) -> EncodedChat:
        """Tokenise a conversation.

        A token that holds characters of a chosen turn is a target, the token that ends the turn included; the line
        break that some templates put after that token is not: nobody generates it.

        Args:
            conversation: the messages.
            turns: indices of the assistant's messages whose tokens are targets.

        Raises:
            ValueError: The template refuses the conversation, leaves messages of it out, or does not let the turns
                be told from the rest.
        """
        messages, tools = conversation
        template = self.tokenizer.get_chat_template(tools=tools)
        text, marked = _render(self.tokenizer, messages, tools)
        self._refuse_omissions(messages, tools, text)
        if _GENERATION.search(template) and list(turns) == conversation.assistant_turns:
            spans = marked
        else:
            spans = [self._span_of_turn(messages, tools, turn, text) for turn in turns]
            if _GENERATION.search(template):
                spans = _intersections(marked, spans)
        return self._tokenize(text, spans, extend=bool(marked))

    def _span_of_turn(self, messages: list[Message], tools: list[Any] | None, turn: int, text: str) -> _Span:
        """Where in `text` the assistant's message `turn` stands, from the end of its prompt to the end of its turn."""
        prompt, _ = _render(self.tokenizer, messages[:turn], tools, ask=True)
        if not text.startswith(prompt):
            raise ValueError(
                f"with this chat template message {turn + 1} (assistant) does not begin where its prompt ends: the "
                f"prompt is {_around(prompt, text)}, the conversation {_around(text, prompt)}; {_WAY_OUT}"
            )
        if turn == len(messages) - 1:
            return len(prompt), len(text)
        until, _ = _render(self.tokenizer, messages[: turn + 1], tools)
        if not text.startswith(until):
            raise ValueError(
                f"with this chat template message {turn + 1} (assistant) is another text when it is the last one: "
                f"{_around(until, text)}, and {_around(text, until)} when messages follow; train on the last turn "
                f"alone (loss_on: last), or {_WAY_OUT}"
            )
        return len(prompt), len(until)

    def _refuse_omissions(self, messages: list[Message], tools: list[Any] | None, text: str) -> None:
        """Refuse what the template leaves out in silence: system or tool messages, and calls of tools."""
        for role in {message["role"] for message in messages} - {"user", "assistant"}:
            changed = [{**m, "content": m["content"] + "~"} if m["role"] == role else m for m in messages]
            if _render(self.tokenizer, cast(list[Message], changed), tools)[0] == text:
                raise ValueError(f"the chat template leaves out {role} messages: give another `chat_template`")
        if any("tool_calls" in message for message in messages):
            changed = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
            if _render(self.tokenizer, cast(list[Message], changed), tools)[0] == text:
                raise ValueError("the chat template leaves out tool calls: give another `chat_template`")

    def _tokenize(self, text: str, spans: list[_Span], extend: bool) -> EncodedChat:
        if surrogate := _SURROGATE.search(text):
            raise ValueError(
                f"the text holds half of a surrogate pair (U+{ord(surrogate[0]):04X}), which is no character"
            )
        # The template has written the beginning of the sequence, if there is one: no second one is added.
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        input_ids = cast(list[int], encoding["input_ids"])
        offsets = cast(list[tuple[int, int]], encoding["offset_mapping"])
        begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        targets = np.zeros(len(input_ids), dtype=bool)
        for begin, end in spans:
            (inside,) = np.nonzero((ends > begin) & (begins < end) & (ends > begins))
            if inside.size:
                first, last = int(inside[0]), int(inside[-1])
                pieces = [text[slice(*offset)] for offset in offsets[first : last + _LONGEST_END]]
                length = self._turn_length(input_ids[first : last + _LONGEST_END], pieces, last - first + 1, extend)
                targets[first : first + length] = True
        return EncodedChat(input_ids, targets.tolist())

    def _turn_length(self, input_ids: list[int], pieces: list[str], length: int, extend: bool) -> int:
        """The number of tokens up to the one that ends a turn, given that the turn's span has `length` tokens."""
        last = length
        while last > 0 and input_ids[last - 1] not in self._added and not pieces[last - 1].strip():
            last -= 1
        if last > 0 and input_ids[last - 1] in self._added:
            return last
        # A template may mark the answer without the token that ends it; without it no model learns to stop.
        following = length
        while extend and following < len(pieces) and not pieces[following].strip():
            following += 1
        if extend and following < len(pieces) and input_ids[following] in self._may_end_turn:
            return following + 1
        return length


@lru_cache(maxsize=4)
def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of a tokenizer, made once: looking through thousands of special tokens takes longer than a row."""
    return ChatEncoder(tokenizer)


_LONGEST_END = 8
"""Tokens among which the one that ends a turn is looked for, after a span that a template marks."""

_WAY_OUT = "give a `chat_template` with {% generation %} around what the assistant says"


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None, ask: bool = False
) -> tuple[str, list[_Span]]:
    """The text of messages, and the spans that the template marks with `{% generation %}`.

    Args:
        tokenizer: has the template.
        messages: the conversation, or the beginning of one.
        tools: see `Conversation`.
        ask: append what makes an assistant answer.

    Raises:
        ValueError: The template refuses the messages, or is broken.
    """
    template = tokenizer.get_chat_template(tools=tools)
    arguments: dict[str, Any] = {**tokenizer.special_tokens_map, "add_generation_prompt": ask}
    marks = _GENERATION.search(template) is not None
    try:
        rendered: Any = render_jinja_template(
            [cast(list[dict[str, Any]], messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            **arguments,
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


def _intersections(first: list[_Span], second: list[_Span]) -> list[_Span]:
    pairs = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return [(begin, end) for begin, end in pairs if begin < end]


def _around(text: str, other: str) -> str:
    """The part of `text` where it stops being like `other`, for a message."""
    alike = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(f"…{text[max(0, alike - 20) : alike + 40]}…")
