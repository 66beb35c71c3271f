"""What a teacher store depends on, and where it is therefore kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lightllm.batch import Document
from lightllm.models.load import cache_folder, checkpoint_digest
from lightllm.models.network import Network

_FORMAT = 1
"""To be raised when stores of before would be read wrongly."""


class DocumentStore(Protocol):
    """What is asked of the tokens of a split's documents: `lightllm.datamodules` has it."""

    digest: str

    def piece(self, document: int, start: int = 0, length: int | None = None) -> Document:
        """A piece of a document."""


class Documents(Protocol):
    """What is asked of a split's documents: `lightllm.datamodules` has it."""

    @property
    def store(self) -> DocumentStore:
        """Their tokens."""

    @property
    def examples(self) -> NDArray[np.int64]:
        """Their ids, `[num_examples, documents_per_row]`."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions that each fills, of the same shape."""


class Lesson(NamedTuple):
    """What a teacher is asked, beside the documents; all of it decides what the answers are."""

    teacher: Network
    bits: int | None
    """In which its matrices are stored."""
    k: int
    """Tokens that are kept at each target."""
    temperature: float
    vocabulary: int
    """Tokens that the student knows: of a larger vocabulary of the teacher's, the first so many are compared."""

    def folders(self, documents: Mapping[str, Documents], root: str | None) -> dict[str, Path]:
        """Where the answers at the targets of each split's documents are kept; the teacher's weights are read for it.

        Args:
            documents: The documents of each split, with how much of each is used.
            root: Folder of all such stores; `$LIGHTLLM_CACHE/teachers` when None.
        """
        place = cache_folder() / "teachers" if root is None else Path(root).expanduser()
        fields = dict(vars(self.teacher))
        name = fields.pop("name", None)  # what it leads to counts, and not the way there
        weights = checkpoint_digest(name) if isinstance(name, str) else None
        settings = self._asdict() | {"teacher": [type(self.teacher).__qualname__, fields, weights]}
        return {split: place / _digest(settings, chosen) for split, chosen in documents.items()}


def _digest(settings: Mapping[str, Any], documents: Documents) -> str:
    text = json.dumps([_FORMAT, settings, documents.store.digest], sort_keys=True, default=repr)
    digest = hashlib.sha256(text.encode())
    for array in (documents.examples, documents.lengths):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]
