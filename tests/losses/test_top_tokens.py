from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import linear_top_tokens

VOCAB, WIDTH = 40, 8


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, VOCAB, (3, 5))
    labels[0, 1] = labels[2, 4] = IGNORE_INDEX
    return torch.randn(3, 5, WIDTH), torch.randn(VOCAB, WIDTH), labels


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("k", [1, 7, VOCAB])
def test_equals_full_logits(k: int, chunk_tokens: int | None) -> None:
    hidden, weight, labels = inputs()
    bias = torch.randn(VOCAB)
    terms = {"bias": bias, "softcap": 3.0, "logit_scale": 0.8}
    found = linear_top_tokens(hidden, weight, labels, k, temperature=2.0, chunk_tokens=chunk_tokens, **terms)
    logits = 3.0 * torch.tanh(0.8 * F.linear(hidden, weight, bias) / 3.0)[labels != IGNORE_INDEX]
    log_p = torch.log_softmax(logits.double() / 2.0, -1)
    values, ids = log_p.sort(-1, descending=True)
    assert torch.equal(found.ids, ids[:, :k])
    torch.testing.assert_close(found.log_probabilities.double(), values[:, :k], rtol=1e-5, atol=1e-5)
    expected = values[:, k:].exp().sum(1)
    torch.testing.assert_close(found.log_tail.exp().double(), expected, rtol=1e-5, atol=1e-12)


def test_a_small_tail_keeps_its_digits() -> None:
    hidden, weight, labels = inputs()
    found = linear_top_tokens(hidden, 16 * weight, labels, 1)
    logits = (hidden.double() @ (16 * weight.double()).t())[labels != IGNORE_INDEX]
    log_p = torch.log_softmax(logits, -1).sort(-1, descending=True).values
    expected = log_p[:, 1:].logsumexp(1)
    assert -80 < expected.min() < -30
    torch.testing.assert_close(found.log_tail.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_targets_and_low_precision() -> None:
    hidden, weight, labels = inputs()
    empty = linear_top_tokens(hidden, weight, torch.full_like(labels, IGNORE_INDEX), 3)
    assert [list(tensor.shape) for tensor in empty] == [[0, 3], [0, 3], [0]]
    low = linear_top_tokens(hidden.bfloat16(), weight.bfloat16(), labels, 3)
    assert low.log_probabilities.dtype == torch.float32


def test_what_is_refused() -> None:
    given = inputs()
    with pytest.raises(ValueError, match="k is 41: give a number of tokens from 1 to the vocabulary's 40"):
        linear_top_tokens(*given, 41)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        linear_top_tokens(*given, 4, temperature=0.0)
