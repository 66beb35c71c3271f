from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, Document, TextBatch, pack_documents
from lightllm.masking import PLANES, MaskedVocabulary, Masking, choose, fixed_uniforms, mask_batch, span_rate

VOCABULARY, MASK, SPECIAL = 50, 4, 5
"""Token ids below 5 are special; odd ones begin a word, even ones go on with it."""


def vocabulary() -> MaskedVocabulary:
    tokens = torch.arange(VOCABULARY)
    return MaskedVocabulary(MASK, tokens < SPECIAL, tokens % 2 == 1)


def rows(count: int = 200, length: int = 60) -> TextBatch:
    """Two documents a row that begin and end with a special token, and padding."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(2 * count):
        ids = torch.randint(SPECIAL, VOCABULARY, (length,), generator=generator)
        ids[0], ids[-2] = 2, 3
        made.append(Document(ids, [True] * length, index))
    packed = [made[index : index + 2] for index in range(0, len(made), 2)]
    return pack_documents(packed, 2 * length + 5)


def uniforms(batch: TextBatch, seed: int = 0) -> Tensor:
    return torch.rand(PLANES, *batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("units", ["tokens", "words", "spans"])
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_the_share_of_chosen_tokens_and_what_becomes_of_them(units: Any, share: float) -> None:
    batch = rows(600)
    masked = mask_batch(batch, Masking(share=share, units=units), vocabulary(), uniforms(batch))
    chosen = masked["labels"] != IGNORE_INDEX
    ordinary = (batch["input_ids"] >= SPECIAL) & (batch["document_ids"] != PADDING_DOCUMENT)
    assert not (chosen & ~ordinary).any()
    assert abs(float(chosen[ordinary].float().mean()) - share) < 0.15 * share
    assert torch.equal(masked["labels"][chosen], batch["input_ids"][chosen])
    assert torch.equal(masked["input_ids"][~chosen], batch["input_ids"][~chosen])
    after, before = masked["input_ids"][chosen], batch["input_ids"][chosen]
    is_mask, same = after == MASK, after == before
    assert abs(float(is_mask.float().mean()) - 0.8) < 0.02
    # A random token is the one that was there once in 45 times.
    assert abs(float(same.float().mean()) - (0.1 + 0.1 / 45)) < 0.02
    drawn = after[~is_mask & ~same]
    assert set(drawn.tolist()) == set(range(SPECIAL, VOCABULARY))
    assert torch.equal(masked["position_ids"], batch["position_ids"])


def words_of(batch: TextBatch) -> list[list[tuple[int, int]]]:
    """Places of each word of ordinary tokens, found by a plain loop."""
    words: list[list[tuple[int, int]]] = []
    for row in range(len(batch["input_ids"])):
        open_word = False
        for place, token in enumerate(batch["input_ids"][row].tolist()):
            document = int(batch["document_ids"][row, place])
            if token < SPECIAL or document == PADDING_DOCUMENT:
                open_word = False
                continue
            if not open_word or token % 2 == 1 or int(batch["position_ids"][row, place]) == 0:
                words.append([])
            words[-1].append((row, place))
            open_word = True
    return words


@pytest.mark.parametrize("units", ["words", "spans"])
def test_words_are_chosen_whole(units: Any) -> None:
    batch = rows(40)
    chosen = choose(batch, Masking(units=units), vocabulary(), uniforms(batch))
    words = words_of(batch)
    assert sum(len(word) > 1 for word in words) > 100
    for word in words:
        flags = {bool(chosen[place]) for place in word}
        assert len(flags) == 1, word


def test_spans_are_those_of_a_plain_loop() -> None:
    batch = rows(30)
    masking = Masking(units="spans", share=0.3, span_end=0.4, longest_span=4)
    numbers = uniforms(batch)
    chosen = choose(batch, masking, vocabulary(), numbers)
    rate = span_rate(masking)
    weights = torch.tensor([0.6**k * 0.4 for k in range(4)])
    ends = (weights / weights.sum()).cumsum(0)
    for row in range(len(chosen)):
        left = 0
        for place in range(chosen.shape[1]):
            token = int(batch["input_ids"][row, place])
            special, first = token < SPECIAL, int(batch["position_ids"][row, place]) == 0
            after_special = place > 0 and int(batch["input_ids"][row, place - 1]) < SPECIAL
            if first:
                left = 0
            if first or special or after_special or token % 2 == 1:
                left = max(0, left - 1)
                if numbers[0, row, place] < rate:
                    length = 1 + int((ends < numbers[1, row, place]).sum())
                    left = max(left, length)
            expected = left > 0 and not special and int(batch["document_ids"][row, place]) != PADDING_DOCUMENT
            assert bool(chosen[row, place]) == expected, (row, place)


def test_spans_are_longer_than_words() -> None:
    batch = rows(100)
    runs = []
    for masking in (Masking(units="words"), Masking(units="spans")):
        chosen = choose(batch, masking, vocabulary(), uniforms(batch))
        begins = chosen[:, 1:] & ~chosen[:, :-1]
        runs.append(float(chosen.sum() / begins.sum()))
    assert runs[1] > 2 * runs[0]


def test_measured_documents_are_masked_alike_wherever_they_lie() -> None:
    generator = torch.Generator().manual_seed(3)
    made = [Document(torch.randint(SPECIAL, VOCABULARY, (20,), generator=generator), [True] * 20, i) for i in range(6)]
    one = pack_documents([made[:3], made[3:]])
    other = pack_documents([[made[4]], [made[1], made[5]], [made[0]]])
    found = []
    for batch in (one, other):
        masked = mask_batch(batch, Masking(), vocabulary(), fixed_uniforms(batch))
        found.append({i: masked["input_ids"][batch["document_ids"] == i].tolist() for i in (0, 1, 4, 5)})
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[0].values()}) == 4


def test_fixed_numbers_are_uniform_and_unrelated() -> None:
    documents = torch.arange(400)[:, None].expand(400, 50)
    places = torch.arange(50).expand(400, 50)
    numbers = fixed_uniforms(TextBatch(input_ids=places, labels=places, position_ids=places, document_ids=documents))
    assert numbers.shape == (PLANES, 400, 50)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    for plane in numbers:
        counts = torch.histc(plane, 10, 0, 1) / plane.numel()
        assert (counts - 0.1).abs().max() < 0.01
    pairs = [
        numbers[0].flatten(),
        numbers[1].flatten(),
        numbers[0].roll(1, 1).flatten(),
        numbers[0].roll(1, 0).flatten(),
    ]
    correlations = torch.corrcoef(torch.stack(pairs)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.03


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0.0}, "masking.share is 0.0"),
        ({"mask": 0.9, "random": 0.2}, "whose sum is at most 1"),
        ({"span_end": 1.0}, "masking.span_end is 1.0"),
        ({"longest_span": 0}, "at least one word"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masking(**fields)
