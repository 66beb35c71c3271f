"""`linear_log_probabilities` against `log_softmax` of the full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import linear_cross_entropy, linear_log_probabilities

VOCAB, HIDDEN = 50, 16
OPTIONS = [{}, {"softcap": 3.0}, {"logit_scale": 0.25}, {"softcap": 2.0, "logit_scale": 1.5}]


def full_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.where(labels != IGNORE_INDEX, 0.0)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(2, 7, HIDDEN, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype).requires_grad_()
    bias = torch.randn(VOCAB, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 7))
    labels[0, :3] = IGNORE_INDEX
    return hidden, weight, bias, labels


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_full_logits(options: dict[str, float], chunk_tokens: int | None) -> None:
    hidden, weight, bias, labels = inputs()
    ours = linear_log_probabilities(hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens, **options)
    expected = full_log_probabilities(hidden, weight, labels, bias, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert (ours[labels == IGNORE_INDEX] == 0).all()
    # A gradient of its own for each position.
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(ours, (hidden, weight, bias), upstream)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected, (hidden, weight, bias), upstream), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict[str, float]) -> None:
    hidden, weight, bias, labels = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_log_probabilities(h, w, labels, bias=b, chunk_tokens=4, **options),
        (hidden, weight, bias),
    )


def test_sum_is_minus_the_cross_entropy() -> None:
    hidden, weight, bias, labels = inputs(torch.float64)
    total = linear_log_probabilities(hidden, weight, labels, bias=bias).sum()
    torch.testing.assert_close(-total, linear_cross_entropy(hidden, weight, labels, bias=bias))


@pytest.mark.parametrize("trained", [False, True])
def test_neither_pass_holds_the_logits(recorded, trained: bool) -> None:
    tokens, vocab, chunk = 64, 1000, 8
    hidden, weight = torch.randn(tokens, 8).requires_grad_(), torch.randn(vocab, 8).requires_grad_(trained)
    labels = torch.randint(0, vocab, (tokens,))
    with recorded() as forward:
        ours = linear_log_probabilities(hidden, weight, labels, chunk_tokens=chunk)
    with recorded() as backward:
        ours.square().sum().backward()
    assert forward.largest == backward.largest == chunk * vocab * 4
    assert forward.num_products == tokens / chunk
    assert backward.num_products == (3 if trained else 2) * tokens / chunk


def test_without_targets() -> None:
    hidden, weight, _, labels = inputs()
    ours = linear_log_probabilities(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    ours.sum().backward()
    assert not ours.any()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_bfloat16_and_autocast() -> None:
    hidden, weight, _, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_log_probabilities(hidden, weight, labels)
    cast = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    lowered = linear_log_probabilities(*cast, labels)
    assert ours.dtype == lowered.dtype == torch.float32
    assert torch.equal(ours, lowered)
    torch.testing.assert_close(ours, full_log_probabilities(hidden, weight, labels), rtol=0.03, atol=0.1)
    # The backward pass runs outside autocast and must take the same products.
    gradients = torch.autograd.grad(ours.square().sum(), (hidden, weight))
    for gradient, reference in zip(gradients, torch.autograd.grad(lowered.square().sum(), cast), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, reference.float(), rtol=0.02, atol=0.02)


def test_backward_takes_the_products_of_the_forward_whatever_autocast_says() -> None:
    hidden, weight, _, labels = inputs()
    loss = linear_log_probabilities(hidden, weight, labels).square().sum()
    expected = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(gradients, expected, rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from dynamo itself
def test_compiled_without_a_graph_break() -> None:
    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(linear_log_probabilities(hidden * 2, weight, labels, chunk_tokens=4)).sum()

    hidden, weight, _, labels = inputs()
    loss = torch.compile(function, backend="aot_eager", fullgraph=True)(hidden, weight, labels)
    expected = function(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    )


def test_second_derivative_is_refused() -> None:
    """It would be silently zero: the gradients have no graph of their own."""
    hidden, weight, _, labels = inputs()
    loss = linear_log_probabilities(hidden, weight, labels).sum()
    with pytest.raises(RuntimeError, match="linear_log_probabilities is differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_label_outside_vocabulary_is_named() -> None:
    hidden, weight, _, labels = inputs()
    labels[1, 2] = VOCAB
    with pytest.raises(ValueError, match=rf"label {VOCAB} at position \[1, 2\]"):
        linear_log_probabilities(hidden, weight, labels)
