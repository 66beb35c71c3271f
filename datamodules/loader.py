"""Loaders: plans in, batches out; the training loader knows its place and goes on from it.

They are no `DataLoader`s, so that Lightning leaves them as they are: it would put its own sampler into one, and share
out again what is shared out already. They hold a `DataLoader` for each pass, for its workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightllm.batch import TextBatch, pack_documents
from lightllm.datamodules.documents import DocumentSet
from lightllm.datamodules.plan import BatchPlan, Plan, Rules, plan_epoch
from lightllm.datamodules.rows import Origin
from lightllm.datamodules.token_store import TokenStore


def make_batch(store: TokenStore, plan: BatchPlan, padding_token: int) -> TextBatch:
    """Read the pieces of a planned batch and lay them in rows."""
    pieces = zip(plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
    documents = [store.piece(*piece) for piece in pieces]
    rows = [documents[begin:end] for begin, end in pairwise(plan.rows.tolist())]
    return pack_documents(rows, plan.width, padding_token)


def unchanged(batch: Any) -> Any:
    """What a `DataLoader` is to do with batches that are made already."""
    return batch


class PlannedBatches:
    """Batches of one rank, epoch by epoch.

    Args:
        documents: What to make batches of.
        rules: How.
        rank: Whose batches.
        num_workers: Processes that read.
        padding_token: The token id on padding.
    """

    def __init__(
        self, documents: DocumentSet, rules: Rules, rank: int = 0, num_workers: int = 0, padding_token: int = 0
    ) -> None:
        self.rules = rules
        self.rank = rank
        self.num_workers = num_workers
        self._documents = documents
        self._dataset = _BatchDataset(documents.store, padding_token)
        self._planned: tuple[int, Plan] | None = None

    def origin(self, document_id: int) -> Origin:
        """Where a document comes from."""
        return self._documents.origin(document_id)

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch; all epochs have as many batches."""
        if self._planned is None or self._planned[0] != epoch:
            plan = plan_epoch(self._documents.examples, self._documents.lengths, self.rules, epoch)
            self._planned = (epoch, plan)
        return self._planned[1]

    def num_batches(self) -> int:
        """Batches of this rank in an epoch."""
        planned = self.plan(0) if self._planned is None else self._planned[1]
        return len(planned) // self.rules.num_ranks

    def read(self, epoch: int, start: int = 0) -> Iterator[TextBatch]:
        """The batches of an epoch, from one on."""
        plan, mine = self.plan(epoch), range(self.rank, self.num_batches() * self.rules.num_ranks, self.rules.num_ranks)
        yield from DataLoader(
            self._dataset,
            batch_size=None,
            sampler=[plan[index] for index in mine[start:]],
            num_workers=self.num_workers,
            collate_fn=unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or else each pass would draw from the run's random numbers
        )


class EvaluationLoader:
    """The batches of an epoch that never changes."""

    def __init__(self, batches: PlannedBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return self._batches.num_batches()

    def __iter__(self) -> Iterator[TextBatch]:
        return self._batches.read(0)

    def origin(self, document_id: int) -> Origin:
        """Where a document comes from."""
        return self._batches.origin(document_id)


class TrainingLoader(ABC):
    """Batches of epoch after epoch, from a place that can be saved and gone back to.

    The place is the loader's own: it counts epochs by what it has given out, and asks neither the trainer's counters,
    which can be one ahead in a checkpoint, nor Lightning's choice whether to restore it. Each pass is a new epoch, but
    the first pass after `load_state_dict` goes on within its epoch, or with the next if that one was done.

    Args:
        settings: What the order of the batches depends on; a saved place fits the same settings only.
        epoch_length: Batches that the trainer takes in an epoch, if it is not all of them.
        reshuffle: Give every epoch its own order.
        rank: Whose places these are, where they differ from rank to rank.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        epoch_length: int | None = None,
        reshuffle: bool = True,
        rank: int | None = None,
    ) -> None:
        self.settings = dict(settings)
        self.rank = rank
        self.epoch_length = epoch_length
        self.reshuffle = reshuffle
        self.epoch = 0
        """Epochs that were begun before this one."""
        self.position = 0
        """Batches of this epoch that were used."""
        self._resuming = True
        """Nothing was used since the place was set."""

    @abstractmethod
    def origin(self, document_id: int) -> Origin:
        """Where a document comes from."""

    @abstractmethod
    def _read(self, epoch: int) -> Iterator[TextBatch]:
        """The batches of an epoch from the current place on; counts `position`."""

    @abstractmethod
    def _epoch_is_done(self) -> bool:
        """Tell whether the current epoch has no batch left."""

    def __iter__(self) -> Iterator[TextBatch]:
        # All of this happens when the first batch is asked for: Lightning makes iterators that it never uses.
        if not self._resuming or self._epoch_is_done():
            self.epoch += 1
            self.position = 0
            self._go_to({})
        yield from self._read(self.epoch if self.reshuffle else 0)

    @abstractmethod
    def _place_within(self) -> dict[str, Any]:
        """What the place is made of, beside epoch and position."""

    @abstractmethod
    def _go_to(self, place: Mapping[str, Any]) -> None:
        """Go to a place that `_place_within` gave, or, if it is empty, to the begin of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """The place, with the settings that it holds for."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "within": self._place_within(),
            "rank": self.rank,
            "settings": self.settings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place; one of another rank is left alone, as Lightning hands rank zero's to all.

        Raises:
            ValueError: The place is one of other data, or of batches that were made otherwise.
        """
        saved = state["settings"]
        changed = [
            f"{name} was {saved.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted({*saved, *self.settings})
            if saved.get(name) != self.settings.get(name)
        ]
        if changed:
            raise ValueError(
                "the checkpoint's place in the data can't be found again, because the batches would be others: "
                f"{'; '.join(changed)}. Resume with what the run began with, or start a new run from its weights"
            )
        if state["rank"] != self.rank:
            return
        self.epoch, self.position, self._resuming = state["epoch"], state["position"], True
        self._go_to(state["within"])


def states_of_ranks(loader: TrainingLoader) -> list[dict[str, Any]]:
    """The places of all ranks, or one if it is everyone's; every rank must call it."""
    states = [loader.state_dict()]
    if loader.rank is not None and torch.distributed.is_initialized():
        states = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, loader.state_dict())
    return states


def load_state_of_rank(loader: TrainingLoader, states: list[dict[str, Any]]) -> None:
    """Go to this rank's place among those of `states_of_ranks`.

    Raises:
        ValueError: See `TrainingLoader.load_state_dict`.
    """
    mine = [state for state in states if state["rank"] == loader.rank]
    loader.load_state_dict((mine or states)[0])


class PlannedLoader(TrainingLoader):
    """Training batches of documents that are all known beforehand.

    Args:
        batches: What to read.
        settings: See `TrainingLoader`; the rules are added.
        epoch_length: See `TrainingLoader`.
        reshuffle: See `TrainingLoader`.
    """

    def __init__(
        self,
        batches: PlannedBatches,
        settings: Mapping[str, Any],
        epoch_length: int | None = None,
        reshuffle: bool = True,
    ) -> None:
        super().__init__(settings, epoch_length, reshuffle)
        self._batches = batches

    def __len__(self) -> int:
        return self._batches.num_batches()

    @override
    def origin(self, document_id: int) -> Origin:
        return self._batches.origin(document_id)

    @override
    def _read(self, epoch: int) -> Iterator[TextBatch]:
        for batch in self._batches.read(epoch, self.position):
            self.position += 1
            self._resuming = False
            yield batch

    @override
    def _place_within(self) -> dict[str, Any]:
        return {}

    @override
    def _go_to(self, place: Mapping[str, Any]) -> None:
        return

    @override
    def _epoch_is_done(self) -> bool:
        return self.position >= min(len(self), self.epoch_length or len(self))


class _BatchDataset(Dataset[TextBatch]):
    """Batches by their plans."""

    def __init__(self, store: TokenStore, padding_token: int) -> None:
        self.store = store
        self.padding_token = padding_token

    @override
    def __getitem__(self, plan: BatchPlan) -> TextBatch:
        return make_batch(self.store, plan, self.padding_token)
