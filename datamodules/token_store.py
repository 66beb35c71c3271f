"""Token stores: tokenised documents in flat arrays, in memory or mapped from the files of a folder.

tokens.bin        all token ids, one document after another, uint16 or uint32
targets.bin       a bit a token, each document's from a byte of its own on
lengths.npy       tokens of each document
targets_from.npy  index of each document's first target that can be predicted, `NO_TARGET` where there is none
origins.npy       source and line of each document
meta.json         the numbers of rows, and the bad ones among them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightllm.batch import Document
from lightllm.datamodules.rows import BadRow, Origin

NO_TARGET = 2**31 - 1
"""The `targets_from` of a document that nothing can be learned from."""

MAX_LISTED = 100
"""Bad rows whose place and reason are kept; all are counted."""


class EncodedRows(NamedTuple):
    """The documents of some rows, as arrays."""

    tokens: NDArray[Any]
    """Their token ids, one document after another."""
    target_bits: NDArray[np.uint8]
    """Their targets as bits, those of each document padded to a byte."""
    lengths: NDArray[np.int64]
    """Tokens of each document."""
    targets_from: NDArray[np.int64]
    """Index of each document's first target that can be predicted, or `NO_TARGET`."""
    origins: NDArray[np.int64]
    """Source and line of each document, `[num_documents, 2]`."""
    num_rows: int
    """Rows that were read, bad ones included."""
    num_bad_rows: int
    bad_rows: list[BadRow]
    """The first of the bad rows."""


class TokenStore:
    """Documents by their index.

    Args:
        encoded: The arrays.
        source_names: What origins call each source.
        folder: Where the arrays are mapped from, if they are.
        digest: A digest of tokens and targets, if they are mapped.
    """

    def __init__(
        self, encoded: EncodedRows, source_names: Sequence[str], folder: Path | None = None, digest: str = ""
    ) -> None:
        self.encoded = encoded
        self.source_names = list(source_names)
        self.folder = folder
        self.digest = digest
        self._token_ends = np.cumsum(encoded.lengths)
        self._byte_ends = np.cumsum(-(-encoded.lengths // 8))

    @classmethod
    def open(cls, folder: Path, source_names: Sequence[str]) -> TokenStore:
        """Map a folder that `write_store` has filled."""
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        moved = dict(zip(meta["sources"], source_names, strict=True))  # the same content may lie elsewhere by now
        encoded = EncodedRows(
            tokens=_mapped(folder / "tokens.bin", np.dtype(meta["dtype"])),
            target_bits=_mapped(folder / "targets.bin", np.dtype(np.uint8)),
            lengths=np.load(folder / "lengths.npy"),
            targets_from=np.load(folder / "targets_from.npy"),
            origins=np.load(folder / "origins.npy", mmap_mode="r"),
            num_rows=meta["num_rows"],
            num_bad_rows=meta["num_bad_rows"],
            bad_rows=[BadRow(Origin(moved[path], line), reason) for path, line, reason in meta["bad_rows"]],
        )
        return cls(encoded, source_names, folder, meta["digest"])

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is None:
            return type(self), (self.encoded, self.source_names)
        return type(self).open, (self.folder, self.source_names)  # whoever gets it maps the files anew

    def __len__(self) -> int:
        return len(self.encoded.lengths)

    def piece(self, document: int, start: int = 0, length: int | None = None) -> Document:
        """A piece of a document: the tokens at some of its positions, and the one that comes behind.

        Args:
            document: Index of the document.
            start: The piece's first position.
            length: Positions in the piece; up to the document's end when None.
        """
        tokens = int(self.encoded.lengths[document])
        end = tokens if length is None else start + length + 1
        first = int(self._token_ends[document]) - tokens
        first_byte = int(self._byte_ends[document]) - -(-tokens // 8)
        bits = self.encoded.target_bits[first_byte + start // 8 : first_byte + -(-end // 8)]
        flags = np.unpackbits(bits, bitorder="little")[start % 8 : start % 8 + end - start]
        ids = self.encoded.tokens[first + start : first + end].astype(np.int64)
        return Document(torch.from_numpy(ids), torch.from_numpy(flags.astype(bool)), document)

    def origin(self, document: int) -> Origin:
        """Where a document comes from."""
        source, line = self.encoded.origins[document]
        return Origin(self.source_names[source], int(line))


def write_store(folder: Path, parts: Iterable[EncodedRows], source_names: Sequence[str], vocabulary: int) -> None:
    """Write encoded rows into an existing, empty folder, as they come.

    Args:
        folder: Where to.
        parts: The rows, in order.
        source_names: What origins call each source.
        vocabulary: The number of token ids that there are.
    """
    dtype, digest = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32), hashlib.sha256()
    arrays: dict[str, list[NDArray[np.int64]]] = {"lengths": [], "targets_from": [], "origins": []}
    num_rows, num_bad_rows, bad_rows = 0, 0, list[BadRow]()
    with ExitStack() as stack:
        tokens = stack.enter_context((folder / "tokens.bin").open("wb"))
        targets = stack.enter_context((folder / "targets.bin").open("wb"))
        for part in parts:
            for file, content in ((tokens, part.tokens.astype(dtype)), (targets, part.target_bits)):
                file.write(content.tobytes())
                digest.update(content.tobytes())
            digest.update(part.lengths.tobytes())
            for name, parts_of_array in arrays.items():
                parts_of_array.append(getattr(part, name))
            num_rows += part.num_rows
            num_bad_rows += part.num_bad_rows
            bad_rows += part.bad_rows[: MAX_LISTED - len(bad_rows)]
    for name, parts_of_array in arrays.items():
        empty = np.zeros((0, 2) if name == "origins" else 0, dtype=np.int64)
        np.save(folder / f"{name}.npy", np.concatenate([empty, *parts_of_array]))
    meta = {
        "dtype": dtype.name,
        "digest": digest.hexdigest(),
        "sources": list(source_names),
        "num_rows": num_rows,
        "num_bad_rows": num_bad_rows,
        "bad_rows": [[*bad.origin, bad.reason] for bad in bad_rows],
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # nothing to map
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
