from __future__ import annotations

import pytest
import torch

from lightllm.batch import IGNORE_INDEX, Document, pack_documents, pad_documents
from lightllm.modules.text_groups import at_labels, classes_of_texts, rows_by, text_groups


def text(ids: list[int], label: int, document_id: int) -> Document:
    return Document([*ids, label], [*[False] * len(ids), True], document_id)


def triplets() -> list[Document]:
    """Two groups of three; the ids begin at 6."""
    return [
        text([7, 8, 9], 3, 6),
        text([5], 11, 7),
        text([7, 8, 9], 0, 8),
        text([9, 8, 7], 3, 9),
        text([5, 5], 0, 10),
        text([5], 0, 11),
    ]


def test_groups_of_a_batch_in_any_rows() -> None:
    made = triplets()
    for batch in (pad_documents(made), pad_documents(made[::-1]), pack_documents([made[2:], made[:2]])):
        groups = text_groups(batch)
        assert groups.size == 3
        assert groups.levels.tolist() == [11, IGNORE_INDEX]
        digests = groups.digests.tolist()
        assert digests[0] == digests[2]
        assert digests[1] == digests[5]
        assert len(set(digests)) == 4


def test_single_texts() -> None:
    groups = text_groups(pad_documents([text([7, 8], 1, 3), text([9], 1, 4)]))
    assert groups.size == 1
    assert groups.levels.tolist() == [IGNORE_INDEX] * 2


@pytest.mark.parametrize(
    "made",
    [
        triplets()[:5],
        triplets()[1:],
        [text([7], 2, 0), text([8], 0, 2)],
        [Document([5, 6, 7], [True] * 3, 0)],
        [text([7], 0, 0)],
    ],
)
def test_torn_groups_and_other_labels_are_refused(made: list[Document]) -> None:
    with pytest.raises(ValueError, match="does not say which texts belong together"):
        text_groups(pad_documents(made))


def test_rows_by_count_hold_the_same_documents_without_their_padding() -> None:
    made = [text(list(range(5, 6 + n)), 1, n) for n in range(7)]
    batch = pad_documents(made, 20)
    parts = list(rows_by(batch, 3))
    assert [part["input_ids"].shape for part in parts] == [(3, 3), (3, 6), (1, 7)]
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        for index, part in enumerate(parts):
            rows = batch[name][3 * index : 3 * index + 3]  # type: ignore[literal-required]
            assert torch.equal(part[name], rows[:, : part[name].shape[1]])  # type: ignore[literal-required]


def test_classes_of_texts_are_their_one_label() -> None:
    made = [text([7, 8], 2, 3), Document([9, 9], [False, False], 4), text([7], 0, 9)]
    for batch in (pad_documents(made[::-1]), pack_documents([made])):
        assert classes_of_texts(batch).tolist() == [2, IGNORE_INDEX, 0]
        scores = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        found = at_labels(scores, batch)
        given = batch["labels"] != IGNORE_INDEX
        assert sorted(found[given].tolist()) == pytest.approx([0.3, 4.0])
        assert not found[~given].any()
    with pytest.raises(ValueError, match="use ClassificationData"):
        classes_of_texts(pad_documents([Document([5, 6, 7], [True] * 3, 0)]))
