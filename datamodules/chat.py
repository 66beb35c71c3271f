"""Conversations: supervised fine-tuning on what the assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.chat_encoding import chat_encoder, set_chat_template
from lightllm.datamodules.conversation import (
    FORMAT_TITLES,
    ChatFormat,
    detect_format,
    parse_conversation,
)
from lightllm.datamodules.rows import BadRow, Row


@dataclass(eq=False, kw_only=True)
class ChatData(DocumentData):
    """Conversations, one a row, rendered with the tokenizer's chat template.

    Rows are lists of messages, Alpaca's, ShareGPT's or prompt/completion pairs (see `lightllm.datamodules.conversation`
    for their fields); which of them is told by the names of a row's fields, and said before training.

    A tokenizer without a chat template gets the default one (`lightllm.models.chat_template`), and whatever template
    is used stays with the tokenizer, so that the run's exports ask the way that they were taught.

    Example:
        ```yaml
        data:
          class_path: lightllm.datamodules.ChatData
          init_args:
            train: chats-train.jsonl
            val: chats-val.jsonl
            loss_on: last
        ```
    """

    format: ChatFormat | None = None
    """Format of the rows: "messages", "sharegpt", "prompt_completion" or "alpaca"; by their fields' names when None."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens to learn: of all the assistant's turns, of its last one alone, or of the whole text."""
    chat_template: str | None = None
    """Chat template as Jinja text or a file; the tokenizer's own, or else the default, when None."""
    system: str | None = None
    """System message for conversations that have none (whoever asks the model later should give it too)."""

    @override
    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        set_chat_template(tokenizer, self.chat_template)

    @override
    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        title = FORMAT_TITLES[self.format or detect_format(first.values)]
        rank_zero_info(f"{split}: {title} format, {'streamed' if num_rows is None else f'{num_rows:,} rows'}")

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row's conversation as one document, whose targets are what `loss_on` says."""
        try:
            conversation = parse_conversation(row.values, self.format or detect_format(row.values), self.system)
            turns = conversation.assistant_turns
            chat = chat_encoder(self.loaded_tokenizer)(conversation, turns[-1:] if self.loss_on == "last" else turns)
        except ValueError as error:
            raise BadRow(row.origin, str(error)) from error
        targets = [True] * len(chat.targets) if self.loss_on == "all" else chat.targets
        return [Document(chat.input_ids, targets)]
