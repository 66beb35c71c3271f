from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lightllm.batch import Document
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.sources import FileSource
from lightllm.datamodules.tokenization import (
    BYTES_PER_PROCESS,
    EncodedRows,
    RowEncoder,
    choose_processes,
    encode_rows,
    numbered_rows,
)


def encode(row: Row) -> list[Document]:
    """The bytes of the text, and the process that counted them as the last token."""
    if row.values["text"] == "bad":
        raise BadRow(row.origin, "bad")
    ids = [*row.values["text"].encode(), os.getpid() % 200 + 256]
    return [Document(ids, [True] * len(ids))]


def rows(count: int) -> list[tuple[int, Row | BadRow]]:
    texts = ["bad" if index % 10 == 3 else f"text {index}" for index in range(count)]
    return [(index % 2, Row({"text": text}, Origin("f", index + 1))) for index, text in enumerate(texts)]


def joined(parts: list[EncodedRows]) -> tuple[list[int], list[int], list[str]]:
    tokens = [token for part in parts for token in part.tokens.tolist() if token < 256]
    lines = [line for part in parts for line in part.origins[:, 1].tolist()]
    return tokens, lines, [str(bad) for part in parts for bad in part.bad_rows]


def test_processes_give_what_one_gives_in_the_same_order() -> None:
    encoder = RowEncoder(encode, 1, 500)
    alone = list(encode_rows(rows(2000), encoder, 1))
    shared = list(encode_rows(rows(2000), encoder, 2))
    assert joined(alone) == joined(shared)
    assert len(joined(alone)[2]) == 200
    workers = {token for part in shared for token in part.tokens.tolist() if token >= 256}
    assert os.getpid() % 200 + 256 not in workers
    assert sum(part.num_rows for part in shared) == 2000


def test_fault_of_encode_is_raised_from_a_process() -> None:
    encoder = RowEncoder(encode, 1, 100)
    with pytest.raises(ValueError, match=r"f:1: token id .* is outside the vocabulary of 100 tokens"):
        list(encode_rows(rows(1), encoder, 2))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "encode returned 0 documents, but documents_per_row is 1"),
        ([Document([1, 2], [True])], "encode returned 2 tokens, but 1 targets"),
        ([Document([1, 10], [True, True])], "token id 10 is outside the vocabulary of 10 tokens"),
        ([Document([-1, 3], [True, True])], "token id -1 is outside the vocabulary"),
    ],
)
def test_what_breaks_the_contract_is_no_bad_row(documents: list[Document], message: str) -> None:
    encoder = RowEncoder(lambda row: documents, 1, 10)
    with pytest.raises(ValueError, match=message) as error:
        encoder([(0, Row({}, Origin("file", 8)))])
    assert str(error.value).startswith("file:8: ")
    assert not isinstance(error.value, BadRow)


def test_documents_of_a_row_stand_together() -> None:
    pair = [Document([1, 2, 3], [False, True, True]), Document(np.array([4]), np.array([True]))]  # type: ignore[arg-type]
    encoded = RowEncoder(lambda row: pair, 2, 10)([(3, Row({}, Origin("f", 5))), (0, BadRow(Origin("f", 6), "no"))])
    assert encoded.tokens.tolist() == [1, 2, 3, 4]
    assert encoded.lengths.tolist() == [3, 1]
    assert encoded.origins.tolist() == [[3, 5], [3, 5]]
    assert (encoded.num_rows, encoded.num_bad_rows) == (2, 1)


def test_no_rows_make_empty_arrays() -> None:
    encoded = RowEncoder(encode, 1, 10)([])
    assert encoded.tokens.shape == (0,)
    assert encoded.origins.shape == (0, 2)


def test_rows_are_numbered_by_source_and_limited_over_all(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "1"}\nbroken\n')
    sources = [FileSource(str(tmp_path / f"{name}.jsonl")) for name in "ab"]
    assert [(index, row.origin.line) for index, row in numbered_rows(sources, None)] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [(index, row.origin.line) for index, row in numbered_rows(sources, 3)] == [(0, 1), (0, 2), (1, 1)]


def test_processes_are_worth_their_text(tmp_path: Path) -> None:
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_bytes(b"x")
    with large.open("wb") as file:
        file.truncate(1000 * BYTES_PER_PROCESS)
    assert choose_processes([FileSource(str(small))], None) == 1
    assert choose_processes([FileSource(str(small)), FileSource(str(large))], None) == len(os.sched_getaffinity(0))
    assert choose_processes([FileSource(str(small))], 7) == 7
