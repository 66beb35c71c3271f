"""SentencePairData: documents as pairs of passages, for a head that tells whether one follows the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightllm.batch import Document
from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sentence_pair_source import SentencePairSource
from lightllm.datamodules.sources import Source


@dataclass(eq=False, kw_only=True)
class SentencePairData(DocumentData):
    """Two passages of text at a time, as `MaskedPretraining` with a `sentence_loss` reads them.

    Pairs are made of the documents of each source, always the same ones for a seed. What is held out for validation is
    whole documents. A pair is one document of a batch, with the special tokens that the tokenizer gives a pair; its
    only label, at its last token, is 0 where the second passage follows the first and 1 where it does not.

    Example:
        ```yaml
        data:
          class_path: lightllm.datamodules.SentencePairData
          init_args:
            train: pydoc-topics
            tokenizer: {vocab_size: 4096, encoder: true}
            max_length: 128
        ```
    """

    text_field: str = "text"
    """Field of a row that holds the text; text files have it as `text`."""
    pairs: Literal["next", "order"] = "next"
    """What the second passage is where it does not follow: one of another document (BERT, arXiv:1810.04805), or the
    one before (ALBERT, arXiv:1909.11942)."""
    words: int = 40
    """A passage is sentences of together at least so many words; where a pair is too long, the longer one is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words < 1:
            raise ValueError(f"data.words is {self.words}: a passage has at least one")
        self.longest = self.max_length
        """Tokens of a pair at most; what is encoded depends on it."""

    @override
    def encode(self, row: Row) -> list[Document]:
        """The row's pair as one document."""
        first, second, label = (row.values[name] for name in ("first", "second", "label"))
        encoded = self.loaded_tokenizer(first, second, truncation="longest_first", max_length=self.longest)
        ids = cast(list[int], encoded["input_ids"])
        if not ids:
            raise BadRow(row.origin, "nothing is left of the pair as tokens")
        return [Document([*ids, label], [*[False] * len(ids), True])]

    @override
    def texts(self, row: Row) -> Iterator[str]:
        yield row.values["first"]

    @override
    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        kinds = {"next": "the second follows, or is of another document", "order": "in their order, or the other way"}
        rank_zero_info(f"{split}: {num_rows:,} pairs of passages: {kinds[self.pairs]}")

    @override
    def _sources(self, split: str) -> list[Source]:
        if self.reading.streaming:
            raise ValueError("pairs are made of whole sources at once: set data.reading.streaming to false")
        settings = (self.text_field, self.pairs, self.words, self.seed)
        return [SentencePairSource(source, *settings) for source in super()._sources(split)]
