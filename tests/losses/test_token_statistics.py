"""`linear_token_statistics` against the full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import linear_token_statistics

VOCAB = 20


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, bias = torch.randn(4, 30, 8), torch.randn(VOCAB, 8), torch.randn(VOCAB)
    labels = torch.randint(0, VOCAB, (4, 30))
    # Half of the guesses right, so that counting all or none would be seen.
    labels[:2] = F.linear(hidden, weight, bias).argmax(-1)[:2]
    labels[0, :5] = IGNORE_INDEX
    return hidden, weight, bias, labels


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_equals_full_logits(chunk_tokens: int | None, softcap: float | None) -> None:
    hidden, weight, bias, labels = inputs()
    ours = linear_token_statistics(
        hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=0.5, chunk_tokens=chunk_tokens
    )
    logits = F.linear(hidden, weight, bias) * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours.loss_sum, expected, rtol=1e-6, atol=0.0)
    assert ours.weight == 4 * 30 - 5
    assert ours.num_correct == (logits.argmax(-1) == labels).sum()
    assert 50 < ours.num_correct < 70
    assert [value.shape for value in ours] == [(), (), ()]
    assert ours.weight.dtype == ours.num_correct.dtype == torch.int64


def test_forms_no_gradient_and_holds_no_logits(recorded) -> None:
    hidden, weight = torch.randn(64, 8).requires_grad_(), torch.randn(1000, 8).requires_grad_()
    with recorded() as work:
        ours = linear_token_statistics(hidden, weight, torch.randint(0, 1000, (64,)), chunk_tokens=8)
    assert not ours.loss_sum.requires_grad
    assert work.largest == 8 * 1000 * 4
    assert work.num_products == 8


def test_bfloat16_sums_in_float32() -> None:
    hidden, weight, _, labels = inputs()
    ours = linear_token_statistics(hidden.bfloat16(), weight.bfloat16(), labels)
    logits = F.linear(hidden.bfloat16(), weight.bfloat16()).float()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert ours.loss_sum.dtype == torch.float32
    torch.testing.assert_close(ours.loss_sum, expected, rtol=1e-6, atol=0.0)


def test_equal_logits_count_once() -> None:
    """Of equal logits the first is the guess: a network that says nothing is not always right."""
    labels = torch.arange(VOCAB)
    ours = linear_token_statistics(torch.zeros(VOCAB, 8), torch.randn(VOCAB, 8), labels)
    assert ours.num_correct == 1


def test_without_targets() -> None:
    hidden, weight, _, labels = inputs()
    assert [float(value) for value in linear_token_statistics(hidden, weight, torch.full_like(labels, -100))] == [
        0,
        0,
        0,
    ]


def test_compiled_without_a_graph_break() -> None:
    hidden, weight, _, labels = inputs()
    compiled = torch.compile(linear_token_statistics, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        tuple(compiled(hidden, weight, labels)), tuple(linear_token_statistics(hidden, weight, labels))
    )


def test_label_outside_vocabulary_is_named() -> None:
    hidden, weight, _, labels = inputs()
    labels[3, 29] = -7
    with pytest.raises(ValueError, match=r"label -7 at position \[3, 29\]"):
        linear_token_statistics(hidden, weight, labels)
