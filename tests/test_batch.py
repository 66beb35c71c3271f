from __future__ import annotations

import pytest
import torch

from lightllm.batch import (
    IGNORE_INDEX,
    PADDING_DOCUMENT,
    Document,
    batch_to,
    pack_documents,
    pad_documents,
    padding_share,
)


def random_documents(count: int) -> list[Document]:
    lengths = torch.randint(2, 12, (count,)).tolist()
    return [Document(torch.randint(1, 50, (n,)), torch.rand(n) < 0.6, 10 + i) for i, n in enumerate(lengths)]


def test_a_packed_document_is_what_it_is_alone() -> None:
    documents = random_documents(9)
    rows = [documents[:4], documents[4:5], documents[5:]]
    packed = pack_documents(rows, padding_token=3)
    alone = {document.document_id: pad_documents([document]) for document in documents}
    for index, row in enumerate(rows):
        begin = 0
        for document in row:
            end = begin + len(document.input_ids) - 1
            for name, values in alone[document.document_id].items():
                assert torch.equal(packed[name][index, begin:end], values[0])  # type: ignore[literal-required]
            begin = end
        assert (packed["input_ids"][index, begin:] == 3).all()
        assert (packed["labels"][index, begin:] == IGNORE_INDEX).all()
        assert (packed["document_ids"][index, begin:] == PADDING_DOCUMENT).all()


def test_labels_are_the_next_tokens_that_are_targets() -> None:
    batch = pad_documents([Document([5, 6, 7, 8], [True, True, False, True], 2)])
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["labels"].tolist() == [[6, IGNORE_INDEX, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2]]
    assert batch["document_ids"].tolist() == [[2, 2, 2]]
    assert {values.dtype for values in batch.values()} == {torch.int64}  # type: ignore[attr-defined]


def test_padding_counts_on_behind_one_document_and_anew_behind_several() -> None:
    one, two = Document([1, 2, 3], [True] * 3, 0), Document([4, 5], [True] * 2, 1)
    batch = pack_documents([[one], [one, two]], length=6)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 1, 2]]


def test_rows_are_as_long_as_the_longest_or_as_asked() -> None:
    documents = [Document([1, 2, 3], [True] * 3), Document([1, 2], [True] * 2)]
    assert pad_documents(documents)["input_ids"].shape == (2, 2)
    assert pad_documents(documents, length=5)["input_ids"].shape == (2, 5)


def test_padding_share_is_counted_in_positions() -> None:
    documents = [Document([1, 2, 3, 4, 5], [True] * 5, 0), Document([1, 2], [True] * 2, 1)]
    assert padding_share(pad_documents(documents)) == 3 / 8


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        ([], None, "at least one row"),
        ([[Document([1], [True], 7)]], None, "document 7 has 1 tokens"),
        ([[Document([1, 2, 3], [True] * 3)] * 2], 3, "4 positions does not fit in 3"),
    ],
)
def test_what_makes_no_batch_is_refused(rows: list[list[Document]], length: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_documents(rows, length)


def test_a_batch_on_another_device_is_the_same_fields() -> None:
    batch = pack_documents([random_documents(3)])
    moved = batch_to(batch, torch.device("meta"))
    assert {name: (tensor.device.type, tensor.shape) for name, tensor in moved.items()} == {
        name: ("meta", tensor.shape) for name, tensor in batch.items()
    }
