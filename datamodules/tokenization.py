"""From rows to token ids, in as many processes as the amount of text is worth."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

import numpy as np

from lightllm.batch import Document
from lightllm.datamodules.rows import BadRow, Row
from lightllm.datamodules.sources import Source
from lightllm.datamodules.token_store import NO_TARGET, EncodedRows

Encoder = Callable[[Row], list[Document]]

ROWS_AT_ONCE = 256
"""Rows that go to a process together."""

BYTES_PER_PROCESS = 4 << 20
"""Another process pays only for so much text."""


class RowEncoder:
    """Encodes rows and checks what comes out.

    Args:
        encode: From a row to its documents.
        documents_per_row: How many there must be.
        vocabulary: Token ids must be below it.
    """

    def __init__(self, encode: Encoder, documents_per_row: int, vocabulary: int) -> None:
        self.encode = encode
        self.documents_per_row = documents_per_row
        self.vocabulary = vocabulary

    def __call__(self, rows: Sequence[tuple[int, Row | BadRow]]) -> EncodedRows:
        """Encode rows, each with the index of its source.

        Raises:
            ValueError: `encode` breaks its contract, which is no fault of the row.
        """
        documents: list[Document] = []
        origins, bad_rows = [], []
        for source, row in rows:
            if isinstance(row, BadRow):
                bad_rows.append(row)
                continue
            try:
                encoded = self.encode(row)
            except BadRow as bad:
                bad_rows.append(bad)
                continue
            self._check(encoded, row)
            documents += encoded
            origins += [(source, row.origin.line)] * len(encoded)
        return EncodedRows(
            tokens=np.concatenate([np.zeros(0, np.uint32), *(np.asarray(d.input_ids, np.uint32) for d in documents)]),
            target_bits=np.concatenate([np.zeros(0, np.uint8), *(_bits(document) for document in documents)]),
            lengths=np.array([len(document.input_ids) for document in documents], dtype=np.int64),
            targets_from=np.array([_first_target(document) for document in documents], dtype=np.int64),
            origins=np.array(origins, dtype=np.int64).reshape(-1, 2),
            num_rows=len(rows),
            num_bad_rows=len(bad_rows),
            bad_rows=bad_rows,
        )

    def _check(self, documents: list[Document], row: Row) -> None:
        if len(documents) != self.documents_per_row:
            raise ValueError(
                f"{row.origin}: encode returned {len(documents)} documents, but documents_per_row is "
                f"{self.documents_per_row}"
            )
        for document in documents:
            num_tokens, num_targets = len(document.input_ids), len(document.targets)
            if num_tokens != num_targets:
                raise ValueError(f"{row.origin}: encode returned {num_tokens} tokens, but {num_targets} targets")
            if len(document.input_ids):
                lowest, highest = min(document.input_ids), max(document.input_ids)
                if lowest < 0 or highest >= self.vocabulary:
                    raise ValueError(
                        f"{row.origin}: token id {int(highest if lowest >= 0 else lowest)} is outside the vocabulary "
                        f"of {self.vocabulary} tokens"
                    )


def encode_rows(rows: Iterable[tuple[int, Row | BadRow]], encoder: RowEncoder, processes: int) -> Iterator[EncodedRows]:
    """Encode rows in order, in this process or in several."""
    iterator = iter(rows)
    chunks = iter(lambda: list(islice(iterator, ROWS_AT_ONCE)), [])
    if processes <= 1 or sys.platform != "linux":  # elsewhere, processes can't inherit the encoder
        yield from map(encoder, chunks)
        return
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(encoder,)
    ) as pool:
        waiting: deque[Future[EncodedRows]] = deque()
        for chunk in chunks:
            with warnings.catch_warnings():
                # Python 3.12 warns of forks beside threads; the children use none of what the threads hold.
                warnings.simplefilter("ignore", DeprecationWarning)
                waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 3 * processes:  # no more text in memory than this
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def numbered_rows(sources: Sequence[Source], limit: int | None) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of sources, one source after another, with the source's index; the first `limit` of all."""
    rows = ((index, row) for index, source in enumerate(sources) for row, _ in source.rows())
    return islice(rows, limit)


def choose_processes(sources: Sequence[Source], asked: int | None) -> int:
    """How many processes to tokenise with: `asked`, or as many as the amount of text is worth and there are cores.

    Raises:
        ValueError: `asked` is not positive.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"reading.processes is {asked}: at least 1 is needed")
        return asked
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    sizes = [source.num_bytes() for source in sources]
    if None in sizes:
        return cores
    return max(1, min(cores, sum(size or 0 for size in sizes) // BYTES_PER_PROCESS))


_worker_encoder: RowEncoder | None = None


def _start_worker(encoder: RowEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every process has one core


def _encode_in_worker(rows: list[tuple[int, Row | BadRow]]) -> EncodedRows:
    assert _worker_encoder is not None
    return _worker_encoder(rows)


def _bits(document: Document) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.packbits(np.asarray(document.targets, dtype=bool), bitorder="little")


def _first_target(document: Document) -> int:
    """Index of the first target that something comes before."""
    (targets,) = np.nonzero(np.asarray(document.targets, dtype=bool)[1:])
    return int(targets[0]) + 1 if len(targets) else NO_TARGET
