"""A teacher that was asked beforehand: its answers are read from disk, and it is not there itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import TopTokens
from lightllm.losses.top_token_divergence import check_from_top_tokens
from lightllm.models.network import Network
from lightllm.teaching.key import Documents, Lesson
from lightllm.teaching.store import TeacherStore, target_places


class NotTaught(ValueError):
    """The teacher was not asked yet about a run's data."""


@dataclass(frozen=True)
class TeacherCache:
    """Have the teacher asked once, by `lightllm teach`, and its likeliest tokens read from disk in training.

    Args:
        k: How many tokens are kept at each target token, beside what is left for all others together.
        folder: Folder of all such answers; `$LIGHTLLM_CACHE/teachers` when None.

    Raises:
        ValueError: `k` is not positive.
    """

    k: int = 64
    folder: str | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.k < 1:
            raise ValueError(f"k is {self.k}: keep at least 1 token, or 64")


class Answers(NamedTuple):
    """What is known of a teacher's predictions."""

    tokens: TopTokens
    vocabulary: int
    """Tokens that the probabilities are of."""


class CachedTeacher:
    """What stands in for a teacher where its answers are on disk.

    Args:
        stores: Its answers, split by split.
        data: The datamodule, which says where a document is from.
    """

    def __init__(self, stores: Mapping[str, TeacherStore], data: Any) -> None:
        self.stores = dict(stores)
        self._data = data

    @classmethod
    def open(cls, lesson: Lesson, cache: TeacherCache, data: Any) -> CachedTeacher:
        """Find the answers about a datamodule's documents.

        Args:
            lesson: What the teacher was asked.
            cache: Where the answers are.
            data: The datamodule; it is set up.

        Raises:
            NotTaught: There are none for a split.
            ValueError: The data has no documents that could be asked about beforehand.
        """
        stores = {}
        for split, folder in lesson.folders(documents_to_ask(data), cache.folder).items():
            if not folder.is_dir():
                raise NotTaught(
                    f"the teacher was not asked yet about the {split} data with this student's vocabulary, k "
                    f"{lesson.k} and temperature {lesson.temperature:g} (there is no {str(folder)!r}): run `lightllm "
                    "teach` with the same configuration first"
                )
            stores[split] = TeacherStore(folder)
            rank_zero_info(f"{split}: the teacher was asked: {stores[split].describe()}")
        return cls(stores, data)

    def answers(self, batch: TextBatch, split: str) -> Answers:
        """What the teacher predicts at a batch's targets, on its device.

        Raises:
            ValueError: A document, or a position of one, that the teacher was not asked about.
        """
        device, store = batch["labels"].device, self._store(split)
        try:
            found = store.find(target_places(batch))
        except KeyError as error:
            raise ValueError(self._unknown(batch, split, error.args[0])) from None
        return Answers(TopTokens(*(tensor.to(device) for tensor in found)), store.vocabulary)

    def _store(self, split: str) -> TeacherStore:
        if split not in self.stores:
            raise ValueError(f"the teacher was not asked about the {split} data, only about {', '.join(self.stores)}")
        return self.stores[split]

    def _unknown(self, batch: TextBatch, split: str, target: int) -> str:
        chosen = batch["labels"] != IGNORE_INDEX
        document, position = (int(batch[name][chosen][target]) for name in ("document_ids", "position_ids"))
        return (
            f"position {position} of document {document} of the {split} data "
            f"({self._data.describe_document(split, document)}) is not among what the teacher was asked about: the "
            "batches are not of the data that `lightllm teach` read"
        )


def check_cachable(kind: str, teacher: Network, live: Mapping[str, object]) -> None:
    """Refuse what needs the teacher itself.

    Args:
        kind: Of the divergence.
        teacher: Where the teacher comes from.
        live: What of the objective's fields looks at the teacher's inside, or asks about other text, by their names.

    Raises:
        ValueError: Something does.
    """
    check_from_top_tokens(kind)
    wanted = [name for name, value in live.items() if value is not None]
    if wanted:
        raise ValueError(
            f"{' and '.join(wanted)}: a cached teacher says what it predicts for the data, and nothing more; leave "
            "it out, or `cached`"
        )
    if not teacher.restorable:
        raise ValueError(
            f"{type(teacher).__name__} is another network each time it is built, so its answers cannot be kept: name a "
            "teacher with trained weights (Pretrained)"
        )


def documents_to_ask(data: Any) -> dict[str, Documents]:
    """The documents of a datamodule that is set up, by split.

    Raises:
        ValueError: There are none, they are a stream, or they are cut anew in every epoch.
    """
    documents: dict[str, Documents] = getattr(data, "documents", {})
    if not documents:
        raise ValueError(
            "a cached teacher is asked about documents by their number, and this data has none: take one of lightllm's "
            "datamodules, without reading.streaming, or leave out `cached`"
        )
    if data.reading.streaming:
        raise ValueError(
            "a cached teacher is asked about documents by their number, which those of a stream have not: set "
            "data.reading.streaming to false, or leave out `cached`"
        )
    if data.overflow == "split":
        filled = data.batches.mode == "packed" and data.batches.documents is None
        longest = max(int(one.lengths.max(initial=0)) for one in documents.values())
        if filled or longest > data.max_length:
            raise ValueError(
                f"{type(data).__name__} lays texts end to end and cuts them into rows anew in every epoch, or cuts "
                f"long ones (the longest has {longest} positions, data.max_length is {data.max_length}): what the "
                "teacher saw before a token would not be what the student sees. Set data.batches.mode to sorted and "
                "data.max_length to the longest text, or leave out `cached`"
            )
    return documents
