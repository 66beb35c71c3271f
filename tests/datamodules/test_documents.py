from __future__ import annotations

import numpy as np
import pytest

from lightllm.batch import Document
from lightllm.datamodules.documents import choose_rows, select_documents
from lightllm.datamodules.rows import Origin, Row
from lightllm.datamodules.token_store import TokenStore
from lightllm.datamodules.tokenization import RowEncoder


def store_of(documents: list[tuple[int, list[int]]], per_row: int = 1) -> TokenStore:
    """A store of documents, given their numbers of tokens and the indices of their targets."""
    made = [Document(list(range(n)), [place in targets for place in range(n)]) for n, targets in documents]
    rows = [made[begin : begin + per_row] for begin in range(0, len(made), per_row)]
    encoder = RowEncoder(lambda row: rows[row.origin.line - 1], per_row, 100)
    return TokenStore(encoder([(0, Row({}, Origin("f", line + 1))) for line in range(len(rows))]), ["f"])


def test_truncated_documents_keep_their_begin_and_need_a_target_in_it() -> None:
    # Five positions predict the tokens 1 to 5.
    store = store_of([(6, [1]), (9, [5, 8]), (9, [6]), (4, []), (1, [0]), (2, [1])])
    documents = select_documents(store, np.arange(6), 1, 5, "truncate")
    assert documents.examples.tolist() == [[0], [1], [5]]
    assert documents.lengths.tolist() == [[5], [5], [1]]
    assert (documents.num_truncated, documents.num_dropped) == (1, 3)
    assert len(documents) == 3
    assert documents.num_positions == 11
    assert str(documents.origin(5)) == "f:6"
    assert documents[5].document_id == 5


def test_split_documents_keep_everything() -> None:
    store = store_of([(6, [1]), (9, [6]), (1, [0])])
    documents = select_documents(store, np.arange(3), 1, 5, "split")
    assert documents.examples.tolist() == [[0], [1]]
    assert documents.lengths.tolist() == [[5], [8]]
    assert (documents.num_truncated, documents.num_dropped) == (0, 1)


def test_documents_that_belong_together_go_together() -> None:
    store = store_of([(3, [2]), (4, [3]), (3, [2]), (9, [8]), (3, [1]), (9, [1])], per_row=2)
    documents = select_documents(store, np.arange(3), 2, 5, "truncate")
    assert documents.examples.tolist() == [[0, 1], [4, 5]]
    assert documents.num_dropped == 2


def test_rows_alone_are_selected() -> None:
    documents = select_documents(store_of([(3, [1])] * 5), np.array([1, 3]), 1, 5, "truncate")
    assert documents.examples.tolist() == [[1], [3]]


@pytest.mark.parametrize(
    ("num_rows", "fraction", "held_out"), [(100, 0.05, 5), (10, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0), (0, 0.5, 0)]
)
def test_held_out_rows_are_never_all_and_in_no_other_split(num_rows: int, fraction: float, held_out: int) -> None:
    origins = np.stack([np.zeros(num_rows, dtype=np.int64), np.arange(num_rows)], axis=1)
    train, val = choose_rows("train", origins, fraction), choose_rows("val", origins, fraction)
    assert len(val) == held_out
    assert sorted([*train, *val]) == list(range(num_rows))
    assert choose_rows("val", origins, fraction).tolist() == val.tolist()


def test_rows_of_one_row_of_the_source_are_held_out_together() -> None:
    origins = np.array([[0, 1]] * 3 + [[0, 2]] + [[1, 2]] * 2 + [[1, 5]] * 4)
    val = choose_rows("val", origins, 0.5)
    train = choose_rows("train", origins, 0.5)
    assert sorted([*train, *val]) == list(range(10))
    held_out = {tuple(origins[row]) for row in val}
    assert len(held_out) == 2
    assert not held_out & {tuple(origins[row]) for row in train}


def test_all_rows_where_none_are_held_out() -> None:
    origins = np.zeros((4, 2), dtype=np.int64)
    assert choose_rows("train", origins, 0).tolist() == choose_rows("test", origins, 0).tolist() == [0, 1, 2, 3]


def test_an_excerpt_is_spread_evenly_and_keeps_what_belongs_together() -> None:
    documents = select_documents(store_of([(3, [1])] * 10), np.arange(10), 1, 5, "truncate")
    assert documents.spread(4).examples.tolist() == [[0], [2], [5], [7]]
    assert documents.spread(4).lengths.tolist() == [[2]] * 4
    assert documents.spread(99).examples.tolist() == documents.examples.tolist()
    pairs = select_documents(store_of([(3, [1])] * 10, per_row=2), np.arange(5), 2, 5, "truncate")
    assert pairs.spread(5).examples.tolist() == [[0, 1], [4, 5]]
    assert pairs.spread(1).examples.tolist() == [[0, 1]]
