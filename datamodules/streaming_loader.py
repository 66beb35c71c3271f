"""The training loader of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.datamodules.loader import TrainingLoader, unchanged
from lightllm.datamodules.rows import Origin
from lightllm.datamodules.streaming import Stream, StreamedBatches


class StreamingLoader(TrainingLoader):
    """Training batches of a stream.

    Lightning takes a batch ahead from a loader that has no length, to know which is the last one. So that a saved
    place does not leave that batch out, a batch counts as used once `confirm` is called.

    Args:
        stream: What to read.
        num_workers: Processes that read and tokenise.
        settings: See `TrainingLoader`.
        epoch_length: See `TrainingLoader`.
        reshuffle: See `TrainingLoader`.
    """

    def __init__(
        self,
        stream: Stream,
        num_workers: int,
        settings: Mapping[str, Any],
        epoch_length: int | None = None,
        reshuffle: bool = True,
    ) -> None:
        super().__init__(settings, epoch_length, reshuffle, stream.rank)
        self.confirms_itself = True
        """Batches count as used when they are given out; False where `confirm` is called for each."""
        self._stream = stream
        self._num_workers = num_workers
        self._place: dict[str, Any] | None = None
        self._unconfirmed: deque[dict[str, Any]] = deque()
        self._exhausted = False

    def confirm(self) -> None:
        """Count the earliest batch that was given out and is not counted yet as used."""
        self._place = self._unconfirmed.popleft()
        self.position += 1
        self._resuming = False

    @override
    def origin(self, document_id: int) -> Origin:
        return self._stream.origin(document_id)

    @override
    def _place_within(self) -> dict[str, Any]:
        return {"stream": self._place, "exhausted": self._used_up()}

    @override
    def _go_to(self, place: Mapping[str, Any]) -> None:
        self._place, self._exhausted = place.get("stream"), place.get("exhausted", False)
        self._unconfirmed.clear()

    @override
    def _read(self, epoch: int) -> Iterator[TextBatch]:
        self._unconfirmed.clear()  # given out by a pass that nobody goes on with
        loader = StatefulDataLoader(
            StreamedBatches(self._stream, epoch),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or else each pass would draw from the run's random numbers
        )
        if self._place is not None:
            loader.load_state_dict(self._place)
        for batch in loader:
            self._unconfirmed.append(loader.state_dict())
            if self.confirms_itself:
                self.confirm()
            yield batch
        self._exhausted = True

    @override
    def _epoch_is_done(self) -> bool:
        return self._used_up() or (self.epoch_length is not None and self.position >= self.epoch_length)

    def _used_up(self) -> bool:
        return self._exhausted and not self._unconfirmed
