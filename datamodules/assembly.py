"""From documents to the loaders of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lightllm.batch import TextBatch
from lightllm.datamodules.documents import DocumentSet
from lightllm.datamodules.loader import PlannedBatches, PlannedLoader, make_batch
from lightllm.datamodules.plan import Batches, Rules
from lightllm.datamodules.preparation import Reading
from lightllm.datamodules.run_layout import RunLayout, batches_taken
from lightllm.datamodules.sources import Source
from lightllm.datamodules.streaming import Stream
from lightllm.datamodules.streaming_loader import StreamingLoader
from lightllm.datamodules.tokenization import Encoder, RowEncoder

if TYPE_CHECKING:
    from lightllm.datamodules.base import DocumentData


@dataclass(frozen=True)
class Assembly:
    """What all loaders of a run have in common."""

    layout: RunLayout
    batches: Batches
    max_length: int
    seed: int
    num_workers: int
    split: bool
    """See `Rules`."""
    documents_per_row: int
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, data: DocumentData, layout: RunLayout) -> Assembly:
        """As a datamodule's fields say; its tokenizer is loaded."""
        return cls(
            layout=layout,
            batches=data.batches,
            max_length=data.max_length,
            seed=data.seed,
            num_workers=data.num_workers,
            split=data.overflow == "split",
            documents_per_row=data.documents_per_row,
            tokenizer=data.loaded_tokenizer,
        )

    def rules(self, evaluation: bool) -> Rules:
        """The rules of training or evaluation batches.

        Raises:
            ValueError: No batch can be made by them.
        """
        draws = self.batches.documents is not None and not evaluation
        rules = Rules(
            batches=self.batches,
            max_length=self.max_length,
            seed=self.seed,
            split=self.split,
            num_ranks=self.layout.num_ranks,
            accumulate=self.layout.accumulate if draws else 1,
            evaluation=evaluation,
        )
        rules.check(self.documents_per_row)
        return rules

    def plan(self, documents: DocumentSet, evaluation: bool) -> PlannedBatches:
        """Batches of documents, for this rank."""
        rules = self.rules(evaluation)
        return PlannedBatches(documents, rules, self.layout.rank, self.num_workers, self._padding_token)

    def excerpt(self, documents: DocumentSet, num_documents: int | None) -> list[TextBatch]:
        """Batches of at most so many documents, read in this process: once, as in evaluation."""
        chosen = documents if num_documents is None else documents.spread(num_documents)
        return list(replace(self, num_workers=0).plan(chosen, evaluation=True).read(0))

    def draw(self, documents: DocumentSet | None, num_documents: int, seed: int) -> list[TextBatch]:
        """Documents, or pieces of long ones, drawn at random in rows of an epoch: a row a batch, without padding.

        Raises:
            ValueError: There are no documents to draw from, or none are to be drawn.
        """
        if documents is None:
            raise ValueError(
                "calibration draws from the training documents, and these are a stream, or not read yet: set "
                "data.reading.streaming to false"
            )
        if num_documents < 1:
            raise ValueError(f"{num_documents} documents are none to calibrate on: give at least 1 (64)")
        rows = self.plan(documents, evaluation=True).plan(0).draw(num_documents, seed)
        return [make_batch(documents.store, row, self._padding_token) for row in rows]

    @property
    def _padding_token(self) -> int:
        token = self.tokenizer.pad_token_id
        return token if isinstance(token, int) else 0  # any valid id does: nothing is learned from it

    def training_loader(self, batches: PlannedBatches, content: str) -> PlannedLoader:
        """The loader of training batches; `content` says whose place a checkpoint saves."""
        settings = {"documents": content, **_flat(batches.rules)}
        epoch_length = batches_taken(self.layout.epoch_length, batches.num_batches())
        return PlannedLoader(batches, settings, epoch_length, self.layout.reshuffle)

    def streaming_loader(self, sources: list[Source], encode: Encoder, reading: Reading) -> StreamingLoader:
        """The loader of training batches of a stream.

        Raises:
            ValueError: There are several ranks, and nothing else ends the run.
        """
        layout = self.layout
        if layout.num_ranks > 1 and not layout.bounded:
            raise ValueError(
                "with several processes a stream has no end, because they would run out of rows at different steps: "
                "set trainer.max_steps, or trainer.limit_train_batches to a number"
            )
        step = (self.batches.documents or 1) * layout.accumulate
        rules = self.rules(evaluation=False)
        stream = Stream(
            sources=sources,
            encoder=RowEncoder(encode, self.documents_per_row, len(self.tokenizer)),
            rules=Rules(**{**vars(rules), "num_ranks": 1}),
            window=-(-reading.window // step) * step if self.batches.documents else reading.window,
            limit=reading.limit,
            bad_rows=reading.bad_rows,
            padding_token=self._padding_token,
            rank=layout.rank,
            num_ranks=layout.num_ranks,
        )
        content = [[Path(source.name).name, source.num_bytes()] for source in sources]
        settings = {"sources": content, "num_workers": self.num_workers, "window": stream.window, **_flat(rules)}
        epoch_length = layout.epoch_length if isinstance(layout.epoch_length, int) else None
        return StreamingLoader(stream, self.num_workers, settings, epoch_length, layout.reshuffle)


def _flat(rules: Rules) -> dict[str, Any]:
    """The rules by the names that users know."""
    values = asdict(rules)
    batches = {f"batches.{name}": value for name, value in values.pop("batches").items()}
    del values["evaluation"]
    return {**batches, **values}
