"""DocumentData: from sources to batches, for every kind of row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import Document, TextBatch
from lightllm.datamodules.assembly import Assembly
from lightllm.datamodules.documents import DocumentSet, choose_rows, select_documents
from lightllm.datamodules.fingerprint import encoding_digest
from lightllm.datamodules.loader import (
    EvaluationLoader,
    PlannedLoader,
    TrainingLoader,
    load_state_of_rank,
    states_of_ranks,
)
from lightllm.datamodules.plan import Batches
from lightllm.datamodules.preparation import Reading, first_good_row, prepare_store
from lightllm.datamodules.rows import Row
from lightllm.datamodules.run_layout import RunLayout, run_layout, splits_to_read
from lightllm.datamodules.sources import Source, find_sources
from lightllm.datamodules.statistics import Statistics, measure, require_documents
from lightllm.datamodules.streaming_loader import StreamingLoader
from lightllm.datamodules.token_store import TokenStore
from lightllm.datamodules.tokenization import RowEncoder
from lightllm.datamodules.tokenizer_choice import load_chosen, trained_tokenizer
from lightllm.datamodules.train_tokenizer import TrainTokenizer, strings_in


@dataclass(eq=False)
class DocumentData(LightningDataModule, ABC):
    """Reads sources, tokenises them once into a cache, and makes the batches of every stage.

    Subclasses are dataclasses (`@dataclass(eq=False, kw_only=True)`), so that they inherit the fields, and implement
    `encode`. What they add as fields counts in the cache's key, as does their code.

    A resumed run goes on with the very batch that it would have seen (see `TrainingLoader`).
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
    """Of the order of the documents."""
    num_workers: int = 0
    """Processes that assemble batches beside the training process."""

    documents_per_row: ClassVar[int] = 1
    """Documents that `encode` makes of one row and that stay in one batch (2 for preference pairs)."""

    def __post_init__(self) -> None:
        LightningDataModule.__init__(self)
        self.statistics: dict[str, Statistics] = {}
        """Numbers of each split that is not streamed, from `setup` on."""
        self._stores: dict[str, TokenStore] = {}
        self.documents: dict[str, DocumentSet] = {}
        """The documents of each split that is not streamed, from `setup` on."""
        self._loaders: dict[str, TrainingLoader | EvaluationLoader] = {}

    @abstractmethod
    def encode(self, row: Row) -> list[Document]:
        """Tokenise one row into `documents_per_row` documents; `self.tokenizer` is loaded.

        Must depend on nothing but the row, the tokenizer and the public attributes of the datamodule: the result
        is cached under them. It runs in several processes.

        Raises:
            BadRow: The row can't be used; the message says why.
        """

    @property
    def overflow(self) -> Literal["split", "truncate"]:
        """Hook: documents longer than `max_length` are split into consecutive pieces, or cut at the end.

        Documents that are split must have all their tokens as targets, or a batch could have none.
        """
        return "truncate"

    def adapt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hook: change the loaded tokenizer before any row is encoded (a chat template); may be called again."""

    def texts(self, row: Row) -> Iterator[str]:
        """Hook: the texts of a row that a tokenizer is trained on; all its strings, if nothing else is said."""
        return strings_in(row.values)

    def report_rows(self, split: str, first: Row, num_rows: int | None) -> None:
        """Hook: called on rank zero for each split ("train", "val", "test"), to say how it is read.

        Its first row that could be read is given, and the number of its good rows; None when streaming.
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

    @override
    def prepare_data(self) -> None:
        """Tokenise what the coming stage needs, unless the cache has it."""
        self._load_tokenizer()
        for split in self._splits():
            if not self._is_streamed(split):
                self._store(self._origin_of(split))

    @override
    def setup(self, stage: str) -> None:
        """Load the tokenizer, map the coming stage's documents, plan their batches, and say what there is.

        Raises:
            ValueError: A source leads nowhere, is empty or has bad rows; a batch has no room for a row.
        """
        self._load_tokenizer()
        assembly = Assembly.of(self, run_layout(self.trainer))
        for split in self._splits():
            self._report(split)
            self._make_loader(split, assembly)
        if stage == "fit" and self.trainer is not None and "val" not in self._loaders:
            self.trainer.limit_val_batches = 0  # Lightning takes no empty list of loaders for "there are none"

    @property
    def num_train_batches(self) -> int | None:
        """Training batches of this rank in an epoch; None when streaming, or before `setup`."""
        loader = self._loaders.get("train")
        return len(loader) if isinstance(loader, PlannedLoader) else None

    @property
    def train_documents(self) -> DocumentSet:
        """The training documents, from `setup` on (a stream has none)."""
        return self.documents["train"]

    @property
    def val_documents(self) -> DocumentSet:
        """The validation documents, from `setup` on."""
        return self.documents["val"]

    def excerpt(self, split: str, num_documents: int | None = None) -> list[TextBatch]:
        """Batches for whoever measures beside the loop, the same on every rank; no loader moves, no number is drawn.

        Args:
            split: "train", "val" or "test"; there is no batch of one that is streamed or not there.
            num_documents: At most so many, evenly spaced over the split; all when None.
        """
        documents = self.documents.get(split)
        return [] if documents is None else Assembly.of(self, RunLayout()).excerpt(documents, num_documents)

    def calibration_batches(self, num_documents: int, seed: int = 0) -> list[TextBatch]:
        """Training documents drawn at random, in rows without padding; as `excerpt`, it disturbs nothing.

        Raises:
            ValueError: The training data is a stream, or not set up.
        """
        return Assembly.of(self, RunLayout()).draw(self.documents.get("train"), num_documents, seed)

    def describe_document(self, split: str, document_id: int) -> str:
        """Where one of the `document_ids` of a batch of "train", "val", "test" or "predict" is from, as `file:line`."""
        return str(self._loaders[self._predicted() if split == "predict" else split].origin(document_id))

    @override
    def train_dataloader(self) -> TrainingLoader:
        loader = self._loaders["train"]
        assert isinstance(loader, TrainingLoader)
        return loader

    @override
    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        return self._evaluation_loader("val")

    @override
    def test_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """The test documents, or those of validation if there is no test source."""
        return self._evaluation_loader(self._predicted())

    @override
    def on_before_batch_transfer(self, batch: TextBatch, dataloader_idx: int) -> TextBatch:
        loader = self._loaders.get("train")
        if isinstance(loader, StreamingLoader) and self.trainer is not None and self.trainer.training:
            loader.confirm()
        return batch

    @override
    def state_dict(self) -> dict[str, Any]:
        """The place in the training data; of every rank, where they differ."""
        loader = self._loaders.get("train")
        return {"train": states_of_ranks(loader)} if isinstance(loader, TrainingLoader) else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved, if it is to train; see `TrainingLoader`.

        Raises:
            ValueError: The batches would be others than those of the checkpoint.
        """
        loader = self._loaders.get("train")
        training = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if training and isinstance(loader, TrainingLoader) and state_dict:
            load_state_of_rank(loader, state_dict["train"])

    def _evaluation_loader(self, split: str) -> EvaluationLoader | list[EvaluationLoader]:
        loader = self._loaders.get(split)
        return loader if isinstance(loader, EvaluationLoader) else []

    def _predicted(self) -> str:
        return "val" if self.test is None else "test"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None, "_loaders": {}}  # a worker encodes, and needs neither

    def _splits(self) -> list[str]:
        has_val = self.val is not None or (self.reading.val_fraction > 0 and not self.reading.streaming)
        return splits_to_read(self.trainer, has_val, self.test is not None)

    def _origin_of(self, split: str) -> str:
        return "train" if split == "val" and self.val is None else split

    def _is_streamed(self, split: str) -> bool:
        return split == "train" and self.reading.streaming

    def _sources(self, split: str) -> list[Source]:
        names = {"train": self.train, "val": self.val, "test": self.test}[self._origin_of(split)]
        return find_sources(names or [], split, self._is_streamed(split))

    def _load_tokenizer(self) -> None:
        self.reading.check()
        if isinstance(self.tokenizer, TrainTokenizer):
            root = self.reading.cache_root
            self.tokenizer = trained_tokenizer(self.tokenizer, self._sources("train"), root, self.texts)
        elif not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            self.tokenizer = load_chosen(self.tokenizer, self.trainer)
        self.adapt_tokenizer(self.tokenizer)

    def _store(self, split: str) -> TokenStore:
        if split not in self._stores:
            settings = encoding_digest(self, DocumentData, self.loaded_tokenizer)
            encoder = RowEncoder(self.encode, self.documents_per_row, len(self.loaded_tokenizer))
            self._stores[split] = prepare_store(split, self._sources(split), encoder, settings, self.reading)
        return self._stores[split]

    def _make_loader(self, split: str, assembly: Assembly) -> None:
        if self._is_streamed(split):
            loader = assembly.streaming_loader(self._sources(split), self.encode, self.reading)
            loader.confirms_itself = self.trainer is None
            self._loaders[split] = loader
            return
        store = self._store(self._origin_of(split))
        held_out = 0.0 if self.val is not None or split == "test" else self.reading.val_fraction
        rows = choose_rows(split, store.encoded.origins[:: self.documents_per_row], held_out)
        documents = select_documents(store, rows, self.documents_per_row, self.max_length, self.overflow)
        if split == "val" and held_out and not len(rows):
            return  # there are too few rows to hold any out
        require_documents(split, documents, self.max_length)
        self.documents[split] = documents
        batches = assembly.plan(documents, evaluation=split != "train")
        self.statistics[split] = measure(documents, batches.plan(0))
        rank_zero_info(f"{split}: {self.statistics[split].describe(self.max_length)}")
        if split == "train":
            content = f"{len(documents)} documents of {documents.store.digest[:16]}"
            self._loaders[split] = assembly.training_loader(batches, content)
        else:
            self._loaders[split] = EvaluationLoader(batches)

    @rank_zero_only
    def _report(self, split: str) -> None:
        first = first_good_row(self._sources(split), self.encode)
        if first is not None and self._origin_of(split) == split:
            store = None if self._is_streamed(split) else self._store(split).encoded
            self.report_rows(split, first, None if store is None else store.num_rows - store.num_bad_rows)
