"""Streaming: batches of sources that are too big to be tokenised first.

Rows are read in windows. Each worker of each rank has its share of the windows, and makes batches of one window after
another by the same plans as of a whole data set. So its place is small: where the window begins, and how many of its
batches are done; going back to it means reading and tokenising one window again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.datamodules.documents import select_documents
from lightllm.datamodules.files import START, Cursor
from lightllm.datamodules.loader import make_batch
from lightllm.datamodules.plan import Plan, Rules, plan_epoch
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.token_store import TokenStore
from lightllm.datamodules.tokenization import RowEncoder

_LINE_BITS = 40  # a document's id holds the source and the line that it comes from


@dataclass(frozen=True)
class Stream:
    """What is streamed, and how."""

    sources: list[Source]
    encoder: RowEncoder
    rules: Rules
    """For one rank: each plans the windows that it has."""
    window: int
    """Rows that are shuffled and batched together."""
    limit: int | None
    """Rows to read in an epoch."""
    bad_rows: Literal["stop", "skip"]
    padding_token: int
    rank: int
    num_ranks: int

    @property
    def endless(self) -> bool:
        """Ranks would run out of rows at different steps: with several, the stream begins again and never ends."""
        return self.num_ranks > 1

    def origin(self, document_id: int) -> Origin:
        """Where a streamed document comes from."""
        source, line = divmod(document_id // self.encoder.documents_per_row, 1 << _LINE_BITS)
        return Origin(self.sources[source].name, line)


@dataclass
class _Place:
    """Where a window begins."""

    epoch: int
    window: int = 0
    """Its number in the epoch."""
    source: int = 0
    """Place of its first row's source in the epoch's order."""
    cursor: Cursor = START


class _WindowIterator:
    """One worker's batches from a place on; `state_dict` is found and used by torchdata."""

    def __init__(self, stream: Stream, epoch: int, shard: int, num_shards: int) -> None:
        self._stream = stream
        self._shard = shard
        self._num_shards = num_shards
        self._current = _Place(epoch)
        """The window whose batches are given out."""
        self._plan: Plan | None = None
        self._store: TokenStore | None = None
        self._document_ids = torch.zeros(0, dtype=torch.int64)
        self._num_done = 0
        """Batches of the window that were given out."""
        self._idle_since: int | None = epoch
        """The epoch since whose begin no batch came."""
        self._open(self._current)

    def __iter__(self) -> _WindowIterator:
        return self

    def __next__(self) -> TextBatch:
        while self._plan is None or self._num_done >= len(self._plan):
            self._read_window()
        assert self._store is not None
        batch = make_batch(self._store, self._plan[self._num_done], self._stream.padding_token)
        self._num_done += 1
        self._idle_since = None
        local = batch["document_ids"]
        batch["document_ids"] = torch.where(local >= 0, self._document_ids[local], PADDING_DOCUMENT)
        return batch

    def state_dict(self) -> dict[str, Any]:
        place = self._current
        return {
            "epoch": place.epoch,
            "window": place.window,
            "source": place.source,
            "cursor": list(place.cursor),
            "num_done": self._num_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._current = _Place(state["epoch"], state["window"], state["source"], Cursor(*state["cursor"]))
        self._open(self._current)
        self._plan = None
        if state["num_done"]:
            self._read_window()
        self._num_done = state["num_done"]

    def _open(self, place: _Place) -> None:
        """Read on from a place."""
        self._next = place
        order = np.random.default_rng([self._stream.rules.seed, place.epoch]).permutation(len(self._stream.sources))
        self._order: list[int] = order.tolist()
        limit = self._stream.limit
        rest = None if limit is None else max(0, limit - place.window * self._stream.window)
        self._rows = islice(self._read_from(place), rest)

    def _read_from(self, place: _Place) -> Iterator[tuple[int, Row | BadRow, Cursor]]:
        """Rows from a place on, each with the place of its source in the epoch's order and where to go on."""
        for index in range(place.source, len(self._order)):
            start = place.cursor if index == place.source else START
            for row, cursor in self._stream.sources[self._order[index]].rows(start):
                yield index, row, cursor

    def _read_window(self) -> None:
        """Go to this worker's next window.

        Raises:
            StopIteration: There is none.
            ValueError: An endless stream has none for this worker.
        """
        while True:
            place = self._next
            rows = list(islice(self._rows, self._stream.window))
            if not rows:
                if not self._stream.endless:
                    raise StopIteration
                self._begin_again(place.epoch + 1)
                continue
            last, _, cursor = rows[-1]
            self._next = _Place(place.epoch, place.window + 1, last, cursor)
            if place.window % self._num_shards == self._shard and self._make_batches(place, rows):
                return

    def _begin_again(self, epoch: int) -> None:
        if self._idle_since is not None and self._idle_since < epoch - 1:
            raise ValueError(
                f"an epoch of the stream has fewer than {self._num_shards} windows of {self._stream.window} rows, one "
                "for each worker of each process: lower reading.window or num_workers, or don't stream"
            )
        self._idle_since = epoch if self._idle_since is None else self._idle_since
        self._open(_Place(epoch))

    def _make_batches(self, place: _Place, rows: list[tuple[int, Row | BadRow, Cursor]]) -> bool:
        """Tokenise and plan a window; tells whether any batch came of it."""
        stream = self._stream
        encoded = stream.encoder([(self._order[index], row) for index, row, _ in rows])
        if encoded.bad_rows:
            if stream.bad_rows == "stop":
                raise ValueError(f"bad row: {encoded.bad_rows[0]}\nMend it, or skip bad rows: reading.bad_rows=skip")
            rank_zero_warn(f"skipped {encoded.num_bad_rows} bad rows, the first of them {encoded.bad_rows[0]}")
        per_row, rules = stream.encoder.documents_per_row, stream.rules
        store = TokenStore(encoded, [source.name for source in stream.sources])
        good_rows = np.arange(len(store) // per_row)
        documents = select_documents(
            store, good_rows, per_row, rules.max_length, "split" if rules.split else "truncate"
        )
        if not len(documents):
            return False
        order = (place.epoch << 32) + place.window  # every window of every epoch has its own
        self._plan = plan_epoch(documents.examples, documents.lengths, rules, order)
        sources, lines = torch.from_numpy(encoded.origins).unbind(1)
        self._document_ids = ((sources << _LINE_BITS) + lines) * per_row + torch.arange(len(store)) % per_row
        self._store, self._current, self._num_done = store, place, 0
        return True


class StreamedBatches(IterableDataset[TextBatch]):
    """The stream, shared out among workers."""

    def __init__(self, stream: Stream, epoch: int) -> None:
        self.stream = stream
        self.epoch = epoch

    @override
    def __iter__(self) -> _WindowIterator:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        shard = self.stream.rank * workers + index
        return _WindowIterator(self.stream, self.epoch, shard, self.stream.num_ranks * workers)
