"""Plain text: pretraining on all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.rows import BadRow, Row


class TextEncoder:
    """From a row's text to a document in which every token is a target.

    A document begins and ends with the special tokens that the tokenizer itself puts there, and in any case ends with
    a token that says so: the end of sequence, if the tokenizer adds nothing.

    Args:
        tokenizer: The tokenizer.
        field: The row's field that holds the text.
        reads_end: See `TextData.reads_end`.

    Raises:
        ValueError: The tokenizer has no token that could end a document.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, field: str, reads_end: bool = False) -> None:
        self.tokenizer = tokenizer
        self.field = field
        self.reads_end = reads_end
        self._prefix, self._suffix = _special_tokens(tokenizer)

    def __call__(self, row: Row) -> list[Document]:
        """Tokenise a row.

        Raises:
            BadRow: The field is missing, no string, or blank.
        """
        text = text_of(row, self.field)
        ids = cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if row.begins:
            ids = self._prefix + ids
        if row.ends:
            ids = ids + self._suffix
        if self.reads_end:  # only what something comes behind of is read: see `Document`
            return [Document([*ids, ids[-1]], [*[True] * len(ids), False])]
        return [Document(ids, [True] * len(ids))]


@dataclass(eq=False, kw_only=True)
class TextData(DocumentData):
    """Text to learn from its first to its last word: files of prose or code, or a field of a table.

    Text files are read whole; those that are longer than a passage (16 kB) are read in passages. Longer documents than
    a row are cut into pieces, so nothing is lost, and packed rows have no padding.

    Example:
        ```yaml
        data:
          class_path: lightllm.datamodules.TextData
          init_args:
            train: books/**/*.txt
            tokenizer: {vocab_size: 8192}
            max_length: 512
        ```
    """

    text_field: str = "text"
    """Field of a row that holds the text; text files have it as `text`."""
    reads_end: bool = False
    """Have a document's last token read too: for encoders. A network that predicts the next token has no use for it."""

    @property
    @override
    def overflow(self) -> Literal["split", "truncate"]:
        return "split"

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row's text as one document."""
        return self._encoder(row)

    @override
    def texts(self, row: Row) -> Iterator[str]:
        yield text_of(row, self.text_field)

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.loaded_tokenizer, self.text_field, self.reads_end)


def text_of(row: Row, field: str) -> str:
    """The text in a row's field.

    Raises:
        BadRow: The field is missing, no string, or blank.
    """
    if field not in row.values:
        raise BadRow(row.origin, f"no field {field!r} (it has {', '.join(map(repr, row.values)) or 'none'})")
    text = row.values[field]
    if not isinstance(text, str):
        raise BadRow(row.origin, f"the field {field!r} is no text, but {text!r:.40}")
    if not text.strip():
        raise BadRow(row.origin, f"the field {field!r} is empty")
    return text


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What to put before and behind a document."""
    plain = cast(list[int], tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = cast(list[int], tokenizer("a")["input_ids"])
    begin = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    prefix, suffix = whole[:begin], whole[begin + len(plain) :]
    if not suffix:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) has no end-of-sequence token, so that documents would "
                "have no end: give it an eos_token, or name another tokenizer"
            )
        suffix = [tokenizer.eos_token_id]
    return prefix, suffix
