"""Between text and tokens: what a network is asked, and what it adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = "dict[str, str]"
"""One turn of a chat: `{"role": "system" | "user" | "assistant", "content": …}`."""

Prompt: TypeAlias = "str | Sequence[Message] | Sequence[int]"
"""Text to continue, a chat to answer, or token ids to take as they are."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt.

    Text gets the start token that the tokenizer puts before text, unless it begins with it, but never an end token.
    A chat is rendered with the tokenizer's template (see `chat_prompt`) and gets no token more.

    Raises:
        ValueError: Nothing comes out, so there is nothing to continue.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        start = tokenizer.bos_token_id
        if start is not None and start in tokenizer("").input_ids and ids[:1] != [start]:
            ids = [start, *ids]
    elif all(isinstance(item, int) for item in prompt):
        ids = list(cast("Sequence[int]", prompt))
    else:
        ids = tokenizer(chat_prompt(tokenizer, cast("Sequence[Message]", prompt)), add_special_tokens=False).input_ids
    if not ids:
        # A document's beginning: what a network saw before one is the end of the one before.
        ids = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer has no start or end token to begin with: give a text")
    return ids


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text after which a chat model answers.

    Args:
        tokenizer: Its chat template is used; the default one, if it has none.
        messages: The chat so far, with the user's turn last.
    """
    from lightllm.models.chat_template import DEFAULT_CHAT_TEMPLATE

    text = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=True,
        chat_template=DEFAULT_CHAT_TEMPLATE if tokenizer.chat_template is None else None,
    )
    assert isinstance(text, str)
    return text


def incremental_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], new_ids: Iterable[int]
) -> Iterator[str]:
    """Text of new tokens as they come, without special tokens; joined, it is what they add to the prompt's text.

    A token's text can depend on the ones before it (a space at the beginning, a character of several tokens), so that
    each is decoded behind some of them, and bytes that are no whole character yet wait for the rest.
    """
    ids = list(prompt_ids[-_CONTEXT:])
    begin, shown = 0, len(ids)
    for token in new_ids:
        ids.append(token)
        before = _decode(tokenizer, ids[begin:shown])
        text = _decode(tokenizer, ids[begin:])
        if len(text) > len(before) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(before) :]
            begin, shown = max(begin, shown - _CONTEXT), len(ids)
    before = _decode(tokenizer, ids[begin:shown])
    if rest := _decode(tokenizer, ids[begin:])[len(before) :]:
        yield rest


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


_CONTEXT = 6
"""Tokens before a new one that its text may depend on; a character has four bytes, so at most four tokens."""
