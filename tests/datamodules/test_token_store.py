from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lightllm.batch import Document
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.token_store import MAX_LISTED, NO_TARGET, EncodedRows, TokenStore, write_store
from lightllm.datamodules.tokenization import RowEncoder


def documents(count: int = 40) -> list[Document]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, count).tolist()
    tokens = [rng.integers(0, 70_000, length).tolist() for length in lengths]
    targets = [(rng.random(length) < 0.3).tolist() for length in lengths]
    return [Document(*pair, index) for index, pair in enumerate(zip(tokens, targets, strict=True))]


def encoded(of: list[Document]) -> EncodedRows:
    rows = [(index % 2, Row({}, Origin("ab"[index % 2], 10 + index))) for index in range(len(of))]
    iterator = iter(of)
    return RowEncoder(lambda row: [next(iterator)], 1, 70_000)(rows)


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TokenStore:
    if request.param == "memory":
        return TokenStore(encoded(documents()), ["a", "b"])
    parts = [encoded(documents()[:7]), encoded([]), encoded(documents()[7:])]
    parts[2].origins[:] = encoded(documents()).origins[7:]
    write_store(tmp_path, parts, ["a", "b"], 70_000)
    return TokenStore.open(tmp_path, ["a", "b"])


def test_documents_come_back_as_they_were(store: TokenStore) -> None:
    assert len(store) == 40
    for document in documents():
        ids, targets, index = store.piece(document.document_id)
        assert torch.as_tensor(ids).tolist() == document.input_ids
        assert torch.as_tensor(targets).tolist() == document.targets
        assert index == document.document_id
        assert store.origin(index) == Origin("ab"[index % 2], 10 + index)


def test_pieces_are_positions_and_the_token_behind(store: TokenStore) -> None:
    for document in documents():
        length = len(document.input_ids) - 1
        for start in range(length):
            for size in range(1, length - start + 1):
                piece = store.piece(document.document_id, start, size)
                assert torch.as_tensor(piece.input_ids).tolist() == document.input_ids[start : start + size + 1]
                assert torch.as_tensor(piece.targets).tolist() == document.targets[start : start + size + 1]


def test_first_targets_are_those_that_something_comes_before(store: TokenStore) -> None:
    for document, first in zip(documents(), store.encoded.targets_from.tolist(), strict=True):
        places = [place for place, target in enumerate(document.targets) if target and place > 0]
        assert first == (places[0] if places else NO_TARGET)


def test_store_goes_to_another_process_as_its_folder(store: TokenStore) -> None:
    pickled = pickle.dumps(store)
    again = pickle.loads(pickled)
    assert torch.equal(torch.as_tensor(again.piece(5).input_ids), torch.as_tensor(store.piece(5).input_ids))
    if store.folder is not None:
        assert len(pickled) < 500
        assert again.digest == store.digest


def test_digest_is_that_of_tokens_and_targets(tmp_path: Path) -> None:
    digests = []
    for index, (tokens, target, names) in enumerate([(5, True, "a"), (5, True, "b"), (6, True, "a"), (5, False, "a")]):
        folder = tmp_path / str(index)
        folder.mkdir()
        write_store(folder, [encoded([Document([1, tokens], [True, target])])], [names, "c"], 100)
        digests.append(TokenStore.open(folder, [names, "c"]).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path, vocabulary: int, dtype: type) -> None:
    part = encoded([Document([vocabulary - 1, 0], [True, True])])
    write_store(tmp_path, [part], ["a", "b"], vocabulary)
    store = TokenStore.open(tmp_path, ["a", "b"])
    assert store.encoded.tokens.dtype == dtype
    assert torch.as_tensor(store.piece(0).input_ids).tolist() == [vocabulary - 1, 0]


def test_bad_rows_are_counted_and_the_first_kept_under_the_names_of_today(tmp_path: Path) -> None:
    bad = [BadRow(Origin("old.jsonl", line), "empty") for line in range(1, 151)]
    part = encoded([])._replace(num_rows=150, num_bad_rows=150, bad_rows=bad)
    write_store(tmp_path, [part, part], ["old.jsonl"], 100)
    store = TokenStore.open(tmp_path, ["new.jsonl"])
    assert len(store) == 0
    assert (store.encoded.num_rows, store.encoded.num_bad_rows) == (300, 300)
    assert len(store.encoded.bad_rows) == MAX_LISTED
    assert str(store.encoded.bad_rows[2]) == "new.jsonl:3: empty"
