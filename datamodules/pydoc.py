"""PydocData: what the installed Python says of itself, for a first run without files or network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.chat import ChatData
from lightllm.datamodules.rows import Row
from lightllm.datamodules.text import TextData


@dataclass(eq=False, kw_only=True)
class PydocData(DocumentData):
    """The documentation that comes with Python, as conversations or as prose; always the same for one Python.

    Example:
        ```yaml
        data:
          class_path: lightllm.datamodules.PydocData
          init_args:
            kind: chat
            reading: {val_fraction: 0.05}
        ```
    """

    kind: Literal["chat", "prose"] = "chat"
    """chat: questions about the library's functions and classes, answered by their docstrings, as `ChatData` reads
    them; prose: the reference manual, as `TextData` reads it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = self.train or {"chat": "pydoc-chat", "prose": "pydoc-topics"}[self.kind]
        self._reader: DocumentData = ChatData() if self.kind == "chat" else TextData()

    @property
    @override
    def overflow(self) -> Literal["split", "truncate"]:
        return self._reader.overflow

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row's conversation or text as one document."""
        self._reader.tokenizer = self.loaded_tokenizer
        return self._reader.encode(row)

    @override
    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._reader.adapt_tokenizer(tokenizer)

    @override
    def texts(self, row: Row) -> Iterator[str]:
        return self._reader.texts(row)

    @override
    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        self._reader.report_rows(split, first, num_rows)
