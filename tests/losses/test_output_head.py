"""How work is cut."""

from __future__ import annotations

import pytest
import torch

from lightllm.losses.output_head import OutputHead, block_length, default_chunk_tokens, spans, target_positions


@pytest.mark.parametrize(("total", "largest"), [(0, 4), (1, 4), (8, 4), (9, 4), (400, 341), (7, 1)])
def test_spans_cover_everything_once_and_evenly(total: int, largest: int) -> None:
    cut = spans(total, largest)
    assert [index for span in cut for index in range(span.start, span.stop)] == list(range(total))
    lengths = [span.stop - span.start for span in cut]
    assert max(lengths, default=0) <= largest
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert len(cut) == -(-total // largest)


@pytest.mark.parametrize(("vocab", "expected"), [(1 << 13, 1024), (1 << 15, 256), (1 << 18, 256)])
def test_default_chunk_is_a_bounded_buffer_or_the_least_that_is_fast(vocab: int, expected: int) -> None:
    assert default_chunk_tokens(torch.empty(1).expand(vocab, 64), needs_weight=False) == expected


def test_default_chunk_of_a_trained_head_may_be_as_large_as_its_gradient() -> None:
    weight = torch.empty(1).expand(1 << 18, 4096)
    assert default_chunk_tokens(weight, needs_weight=True) == 4096
    assert default_chunk_tokens(weight, needs_weight=False) == 256


def test_block_has_a_row_at_least() -> None:
    assert block_length(1 << 30, torch.device("cpu")) == 1
    assert block_length(1 << 20, torch.device("cpu")) == 2


def test_target_positions() -> None:
    positions, targets = target_positions(torch.tensor([[-100, 3], [0, -100]]), 4, -100)
    assert positions.tolist() == [1, 2]
    assert targets.tolist() == [3, 0]


def test_chain_is_the_derivative_of_the_transform() -> None:
    product = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64)
    head = OutputHead(torch.empty(5, 0), bias, softcap=2.0, logit_scale=0.7)
    upstream = torch.randn(3, 5, dtype=torch.float64)
    logits = 2.0 * torch.tanh(0.7 * (product + bias) / 2.0)
    (expected,) = torch.autograd.grad(logits, product, upstream)
    transformed = head.transform_(product.detach().clone())
    torch.testing.assert_close(transformed, logits.detach())
    torch.testing.assert_close(head.chain_(upstream.clone(), transformed), expected)
