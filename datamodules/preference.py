"""Pairs of answers to one prompt, of which the first is preferred to the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.chat_encoding import chat_encoder, set_chat_template
from lightllm.datamodules.conversation import (
    Conversation,
    Message,
    check_order,
    parse_tools,
    parse_turns,
    with_system,
)
from lightllm.datamodules.rows import BadRow, Row


class Preference(NamedTuple):
    """Two conversations that begin alike."""

    chosen: Conversation
    rejected: Conversation
    prompt_length: int
    """The number of messages that both begin with: what comes after them is preferred or not."""


@dataclass(eq=False, kw_only=True)
class PreferenceData(DocumentData):
    """Pairs of a chosen and a rejected answer, rendered with the tokenizer's chat template.

    A row has the fields `prompt`, `chosen` and `rejected`, each a string or a list of messages; or `chosen` and
    `rejected` alone, as lists of messages that begin alike. It makes two documents, in the same batch: pair p's chosen
    one has the id 2p, its rejected one 2p + 1. Targets are the answers' tokens alone, not those of the prompt's turns.
    """

    chat_template: str | None = None
    """Chat template as Jinja text or a file; the tokenizer's own, or else the default, when None."""
    system: str | None = None
    """System message for prompts that have none (whoever asks the model later should give it too)."""

    documents_per_row: ClassVar[int] = 2

    @override
    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        set_chat_template(tokenizer, self.chat_template)

    @override
    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        rank_zero_info(f"{split}: preference pairs, {'streamed' if num_rows is None else f'{num_rows:,} rows'}")

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row's chosen and rejected documents."""
        encode = chat_encoder(self.loaded_tokenizer)
        try:
            pair = parse_preference(row.values, self.system)
            documents = []
            for conversation in (pair.chosen, pair.rejected):
                answers = [turn for turn in conversation.assistant_turns if turn >= pair.prompt_length]
                documents.append(Document(*encode(conversation, answers)))
        except ValueError as error:
            raise BadRow(row.origin, str(error)) from error
        if documents[0].input_ids == documents[1].input_ids:
            raise BadRow(row.origin, "chosen and rejected are the same once rendered: nothing to prefer")
        return documents


def parse_preference(fields: Mapping[str, Any], system: str | None = None) -> Preference:
    """The pair of a row.

    Args:
        fields: the row.
        system: the content of a system message for a prompt that has none.

    Raises:
        ValueError: A field is missing, empty or of a wrong type, roles are unknown or in a wrong order, or both
            answers are the same.
    """
    for name in ("chosen", "rejected"):
        if fields.get(name) is None:
            raise ValueError(f"the row has no field {name!r} (it has {', '.join(map(repr, fields)) or 'none'})")
        if fields.get("prompt") is None and isinstance(fields[name], str):
            raise ValueError(f"field {name!r} is a string, so that the row needs a field 'prompt'")
    chosen = parse_turns(fields["chosen"], "chosen", "assistant")
    rejected = parse_turns(fields["rejected"], "rejected", "assistant")
    prompt = [] if fields.get("prompt") is None else parse_turns(fields["prompt"], "prompt", "user")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same: nothing to prefer")
    # Some sets give the prompt and repeat it in front of both answers.
    if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        prompt = []
    chosen, rejected = with_system(prompt + chosen, system), with_system(prompt + rejected, system)
    tools = parse_tools(fields)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        try:
            check_order(messages)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    prompt_length = _prompt_length(chosen, rejected)
    return Preference(Conversation(chosen, tools), Conversation(rejected, tools), prompt_length)


def _prompt_length(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of messages that both begin with; the first that differs must be the assistant's."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    length = next((index for index, (first, second) in pairs if first != second), None)
    if length is None:
        raise ValueError("chosen and rejected begin alike and one goes on: nothing to prefer where the other ends")
    if not chosen[length]["role"] == rejected[length]["role"] == "assistant":
        raise ValueError(f"chosen and rejected must answer the same prompt, but message {length + 1} differs before")
    return length
