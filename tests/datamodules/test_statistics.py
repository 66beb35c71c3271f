from __future__ import annotations

import numpy as np
import pytest

from lightllm.batch import Document
from lightllm.datamodules.documents import select_documents
from lightllm.datamodules.plan import Batches, Rules, plan_epoch
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.statistics import measure, require_documents
from lightllm.datamodules.token_store import TokenStore
from lightllm.datamodules.tokenization import RowEncoder

LENGTHS = [4, 9, 30, 2, 12]


def encode(row: Row) -> list[Document]:
    length = LENGTHS[row.origin.line - 1]
    return [Document([1] * length, [length != 2] * length)]


def store() -> TokenStore:
    rows = [(0, Row({}, Origin("f", line))) for line in range(1, 6)]
    return TokenStore(RowEncoder(encode, 1, 9)([*rows, (0, BadRow(Origin("f", 6), "bad"))]), ["f"])


def test_statistics_say_what_became_of_the_rows() -> None:
    documents = select_documents(store(), np.arange(5), 1, 20, "truncate")
    plan = plan_epoch(documents.examples, documents.lengths, Rules(Batches("sorted", tokens=20), 20, 0), 0)
    statistics = measure(documents, plan)
    assert (statistics.num_documents, statistics.num_positions) == (4, 3 + 8 + 20 + 11)
    assert statistics.num_batches == len(plan) == 3
    assert statistics.padding_share == pytest.approx(1 - 42 / (16 + 20 + 11))
    assert statistics.describe(20) == (
        "4 documents, 42 positions in 3 batches, 10.6% padding; 1 document truncated to 20 positions; "
        "1 left out: nothing to learn within 20 positions; 1 bad row skipped"
    )


def test_empty_split_is_refused_with_what_became_of_it() -> None:
    require_documents("train", select_documents(store(), np.arange(5), 1, 20, "truncate"), 20)
    nothing = select_documents(store(), np.array([3]), 1, 20, "truncate")
    message = "val: no documents in f: 6 rows, 1 of them bad, and 1 document with nothing to learn within max_length=20"
    with pytest.raises(ValueError, match=message):
        require_documents("val", nothing, 20)
