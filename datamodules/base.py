"""DocumentData: from sources to batches, for every kind of row."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal

from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lightllm.batch import Document
from lightllm.datamodules.rows import Row
from lightllm.datamodules.train_tokenizer import TrainTokenizer


@dataclass(frozen=True)
class Batches:
    """How documents become batches."""

    mode: Literal["packed", "sorted"] = "packed"
    """packed: rows of exactly `max_length` positions that hold several documents, which can't see each other;
    sorted: one document a row, rows of similar length together, padded to the longest."""
    tokens: int = 8192
    """Positions in a batch, padding included."""
    documents: int | None = None
    """Exactly so many documents in every batch instead of a budget of tokens. An optimizer step then sees a random
    draw of documents * accumulate_grad_batches, and within the step they are grouped by length (sorted) or packed
    into one row a batch (packed)."""


@dataclass(frozen=True)
class Reading:
    """How sources become documents."""

    bad_rows: Literal["stop", "skip"] = "stop"
    """Broken, empty or incomplete rows: stop before training and list them, or skip and count them."""
    limit: int | None = None
    """Read only the first so many rows of every source."""
    val_fraction: float = 0.05
    """Share of the training rows held out for validation when `val` is not given; 0 for none."""
    streaming: bool = False
    """Read and tokenise the training source while training, for sources too big to tokenise first."""
    window: int = 2048
    """Documents that are shuffled and batched together when streaming."""
    processes: int | None = None
    """Processes that tokenise; chosen by the amount of text when None."""
    cache: str | None = None
    """Folder of the token cache; $LIGHTLLM_CACHE or ~/.cache/lightllm when None."""


@dataclass(eq=False)
class DocumentData(LightningDataModule):
    """Reads sources, tokenises them once into a cache, and makes the batches of every stage.

    Subclasses are dataclasses (`@dataclass(eq=False)`), so that they inherit the fields, and implement `encode`.
    """

    train: str | list[str] = field(default_factory=list)
    """Training source: file, folder, glob, hub id, or built-in name ("pydoc-chat", "pydoc-topics"); or several."""
    val: str | list[str] | None = None
    """Validation source; held out from `train` when None (see `reading.val_fraction`)."""
    test: str | list[str] | None = None
    """Test source."""
    _: KW_ONLY
    tokenizer: str | TrainTokenizer | PreTrainedTokenizerBase | None = None
    """Folder or hub id, or `vocab_size` and so on of one to train on `train`; the network's own when None. After
    `setup` the loaded tokenizer."""
    max_length: int = 1024
    """Positions in a row at most."""
    batches: Batches = field(default_factory=Batches)
    """How documents become batches."""
    reading: Reading = field(default_factory=Reading)
    """How sources become documents."""
    seed: int = 0
    """Of the order of the documents and of the held-out split."""
    num_workers: int = 0
    """Processes that assemble batches beside the training process."""

    overflow: ClassVar[Literal["split", "truncate"]] = "truncate"
    """Documents longer than `max_length`: split into consecutive pieces (nothing is lost) or cut at the end."""
    documents_per_row: ClassVar[int] = 1
    """Documents that `encode` makes of one row and that stay in one batch (2 for preference pairs)."""

    def __post_init__(self) -> None:
        LightningDataModule.__init__(self)

    @abstractmethod
    def encode(self, row: Row) -> list[Document]:
        """Tokenise one row into `documents_per_row` documents; `self.tokenizer` is loaded.

        Must depend on nothing but the row, the tokenizer and the public attributes of the datamodule: the result
        is cached under them. It runs in several processes.

        Raises:
            BadRow: The row can't be used; the message says why.
        """

    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hook: change the loaded tokenizer before its fingerprint is taken and any row encoded (a chat template)."""

    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        """Hook: called on rank zero for each split ("train", "val", "test") with its first row, to say how it is read.

        Args:
            split: the split.
            first: its first row that could be read.
            num_rows: the number of its good rows, None when streaming.
        """

    @property
    def loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself (`tokenizer` before `prepare_data` may be just its name).

        Raises:
            RuntimeError: It is not loaded yet.
        """
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise RuntimeError("the tokenizer is loaded by prepare_data() and setup(): call them first")
        return self.tokenizer
