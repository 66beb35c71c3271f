"""Teacher stores: a teacher's likeliest tokens for every target token of a split, mapped from the files of a folder.

places.bin             document and position of each target token, int64 `document << 32 | position`, ascending
ids.bin                its k likeliest tokens, uint16 or uint32
log_probabilities.bin  their log probabilities in nats, float16
log_tails.bin          log of the probability of all other tokens together, float16
meta.json              k, the vocabulary, and what was measured
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import TopTokens


class Measured(NamedTuple):
    """How much of the teacher is in a store, in means over target tokens."""

    tail: float
    """Probability that the teacher gives to tokens which are not kept."""
    whole: float
    """Divergence of the student, as it was, from the whole teacher; in nats, on some of the target tokens."""
    kept: float
    """The same from what is kept, as float16."""


class TeacherStore:
    """What a teacher predicts at target tokens, found by document and position.

    Args:
        folder: One that `write_teacher_store` has filled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.k: int = meta["k"]
        self.vocabulary: int = meta["vocabulary"]
        """Tokens that the probabilities are of."""
        self.measured = Measured(**meta["measured"])
        self.num_targets: int = meta["num_targets"]
        self._places = _mapped(folder / "places.bin", np.int64, (self.num_targets,))
        self._ids = _mapped(folder / "ids.bin", np.dtype(meta["id_dtype"]), (self.num_targets, self.k))
        self._log_probabilities = _mapped(folder / "log_probabilities.bin", np.float16, (self.num_targets, self.k))
        self._log_tails = _mapped(folder / "log_tails.bin", np.float16, (self.num_targets,))

    @property
    def bytes_per_target(self) -> int:
        """Bytes on disk for each target token."""
        arrays = (self._places, self._ids, self._log_probabilities, self._log_tails)
        return sum(array.itemsize * int(np.prod(array.shape[1:])) for array in arrays)

    def find(self, places: Tensor) -> TopTokens:
        """The teacher's likeliest tokens at some places, on the CPU.

        Args:
            places: See `target_places`; int64 `[targets]`.

        Raises:
            KeyError: One of them is not in the store; its argument is that place's index in `places`.
        """
        wanted = places.cpu().numpy()
        rows = np.searchsorted(self._places, wanted)
        found = rows < self.num_targets
        found[found] = self._places[rows[found]] == wanted[found]
        if not found.all():
            raise KeyError(int(np.flatnonzero(~found)[0]))
        return TopTokens(
            torch.from_numpy(self._ids[rows].astype(np.int64)),
            torch.from_numpy(self._log_probabilities[rows].astype(np.float32)),
            torch.from_numpy(self._log_tails[rows].astype(np.float32)),
        )

    def describe(self) -> str:
        """How large it is, and how much of the teacher is in it."""
        whole, kept = self.measured.whole, self.measured.kept
        size = self.num_targets * self.bytes_per_target
        return (
            f"{self.num_targets:,} target tokens, the {self.k} likeliest of {self.vocabulary:,} tokens at each, "
            f"{100 * (1 - self.measured.tail):.2f}% of the teacher's probability; {self.bytes_per_target} bytes each, "
            f"{size / 1e6:,.1f} MB; the student's divergence when it was asked: {kept:.4f} nats, {whole:.4f} from all "
            "tokens"
        )


def target_places(batch: TextBatch) -> Tensor:
    """Where a batch's targets are in their documents, as one number each: int64 `[targets]`, in the labels' order."""
    targets = batch["labels"] != IGNORE_INDEX
    return (batch["document_ids"][targets] << 32) | batch["position_ids"][targets]


def write_teacher_store(
    folder: Path, parts: Iterable[tuple[Tensor, TopTokens]], k: int, vocabulary: int, divergences: tuple[float, float]
) -> None:
    """Write a teacher's predictions into an existing, empty folder, as they come.

    Args:
        folder: Where to.
        parts: Places, ascending over all parts, with what the teacher predicts there.
        k: Tokens at each place.
        vocabulary: Tokens that the probabilities are of.
        divergences: `whole` and `kept` of `Measured`.
    """
    id_dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    num_targets, tail = 0, 0.0
    with ExitStack() as stack:
        names = ("places", "ids", "log_probabilities", "log_tails")
        files = [stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names]
        for places, top in parts:
            tail += float(top.log_tail.double().exp().sum())
            num_targets += len(places)
            tensors = (places, top.ids, top.log_probabilities, top.log_tail)
            dtypes: tuple[np.dtype[Any], ...] = (
                np.dtype(np.int64),
                id_dtype,
                np.dtype(np.float16),
                np.dtype(np.float16),
            )
            for file, tensor, dtype in zip(files, tensors, dtypes, strict=True):
                file.write(tensor.cpu().numpy().astype(dtype).tobytes())
    measured = Measured(tail / max(1, num_targets), *divergences)
    meta = {
        "k": k,
        "vocabulary": vocabulary,
        "id_dtype": id_dtype.name,
        "num_targets": num_targets,
        "measured": measured._asdict(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # nothing to map
        return np.zeros(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
