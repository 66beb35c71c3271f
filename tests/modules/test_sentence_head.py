from __future__ import annotations

import pytest
import torch
from torch import nn

from lightllm.batch import IGNORE_INDEX, Document, TextBatch, pack_documents, pad_documents
from lightllm.modules.sentence_head import SentenceHead, document_labels, document_numbers, token_types

SEPARATOR = 3


def pairs() -> list[Document]:
    """`[2] first [3] second [3]`, with the pair's label as the one target."""
    made = []
    for index, (first, second, label) in enumerate([(2, 3, 1), (4, 1, 0), (1, 1, 1)]):
        ids = [2, *[7] * first, SEPARATOR, *[8] * second, SEPARATOR]
        made.append(Document([*ids, label], [*[False] * len(ids), True], index))
    return made


BATCHES = [
    pad_documents(pairs()),
    pack_documents([pairs()[:2], pairs()[2:]], 20),
    pack_documents([pairs()]),
]


@pytest.mark.parametrize("batch", BATCHES)
def test_labels_and_first_tokens_of_documents_go_together(batch: TextBatch) -> None:
    labels, numbers = document_labels(batch), document_numbers(batch)
    first = (batch["position_ids"] == 0).nonzero()
    assert len(labels) == len(first)
    for number, (row, place) in enumerate(first.tolist()):
        assert int(numbers[row, place]) == number
        document = int(batch["document_ids"][row, place])
        expected = IGNORE_INDEX if document < 0 else [1, 0, 1][document]
        assert int(labels[number]) == expected


@pytest.mark.parametrize("batch", BATCHES)
def test_the_second_text_begins_behind_the_first_separator(batch: TextBatch) -> None:
    types = token_types(batch, SEPARATOR)
    assert types is not None
    tokens, inside = batch["input_ids"], batch["document_ids"] >= 0
    assert types[inside & (tokens == 8)].all()
    assert not types[inside & ((tokens == 7) | (tokens == 2))].any()
    for document in range(3):
        of_document = inside & (batch["document_ids"] == document) & (tokens == SEPARATOR)
        assert types[of_document].tolist() == [0, 1]
    assert token_types(batch, None) is None


def test_labels_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="use SentencePairData"):
        document_labels(pad_documents([Document([1, 2, 3], [True] * 3, 0)]))


def test_the_head_is_two_layers() -> None:
    torch.manual_seed(0)
    head = SentenceHead(8)
    states = torch.randn(5, 8)
    plain = nn.functional.linear(
        torch.tanh(states @ head.dense.weight.T + head.dense.bias), head.classes.weight, head.classes.bias
    )
    torch.testing.assert_close(head(states), plain)
    assert head(states).shape == (5, 2)
