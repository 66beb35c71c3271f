"""`linear_cross_entropy` against `F.cross_entropy` on the full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import linear_cross_entropy

VOCAB, HIDDEN = 50, 16
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0, "logit_scale": 1.5},
]


def full_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits, labels = logits.flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing)
    return loss + z_loss * logits[labels != IGNORE_INDEX].logsumexp(-1).square().sum()


def inputs(dtype: torch.dtype = torch.float32, rows: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, 7, HIDDEN, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype).requires_grad_()
    bias = torch.randn(VOCAB, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows, 7))
    labels[0, :3] = IGNORE_INDEX
    labels[-1, -1] = IGNORE_INDEX
    return hidden, weight, bias, labels


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_full_logits(options: dict[str, float], with_bias: bool, chunk_tokens: int | None) -> None:
    hidden, weight, bias, labels = inputs()
    given = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias = bias if with_bias else None
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens, **options)
    expected = full_cross_entropy(hidden, weight, labels, bias, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    # Scaled, because the upstream gradient of a mean is not 1.
    gradients = torch.autograd.grad(loss / 3, given)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected / 3, given), strict=True):
        assert gradient.shape == reference.shape
        assert relative_error(gradient, reference) < 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict[str, float]) -> None:
    hidden, weight, bias, labels = inputs(torch.float64, rows=2)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, chunk_tokens=4, **options), (hidden, weight, bias)
    )


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, _, labels = inputs()
    hidden = (hidden * 1e4).detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    expected = full_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_ignored_positions_have_no_gradient_and_inputs_stay() -> None:
    hidden, weight, _, labels = inputs()
    before = [tensor.detach().clone() for tensor in (hidden, weight, labels)]
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=4).backward()
    assert hidden.grad is not None
    assert (hidden.grad[labels == IGNORE_INDEX] == 0).all()
    assert (hidden.grad[labels != IGNORE_INDEX] != 0).any(-1).all()
    for tensor, copy in zip((hidden, weight, labels), before, strict=True):
        assert torch.equal(tensor, copy)


def test_own_ignore_index() -> None:
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels.where(labels != IGNORE_INDEX, 7), ignore_index=7)
    expected = full_cross_entropy(hidden, weight, labels.where(labels != 7, IGNORE_INDEX))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)


def test_without_targets() -> None:
    hidden, weight, bias, labels = inputs()
    labels = torch.full_like(labels, IGNORE_INDEX)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    loss.backward()
    assert loss == 0.0
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_tied_embedding() -> None:
    embedding = nn.Embedding(VOCAB, HIDDEN)
    layer = nn.Linear(HIDDEN, HIDDEN)
    tokens, labels = torch.randint(0, VOCAB, (2, 2, 7))
    hidden = layer(embedding(tokens))
    parameters = [embedding.weight, *layer.parameters()]
    gradients = torch.autograd.grad(
        linear_cross_entropy(hidden, embedding.weight, labels), parameters, retain_graph=True
    )
    expected = torch.autograd.grad(full_cross_entropy(hidden, embedding.weight, labels), parameters)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-6


def test_backward_twice_gives_the_same() -> None:
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), grad_outputs=torch.tensor(0.5), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), grad_outputs=torch.tensor(0.5))
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def test_second_derivative_is_refused() -> None:
    """It would be silently zero: the gradients have no graph of their own."""
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


class TestWorkAndMemory:
    tokens, targets, vocab, hidden, chunk = 96, 64, 1000, 8, 8

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.randint(0, self.vocab, (self.tokens,))
        labels[: self.tokens - self.targets] = IGNORE_INDEX
        return torch.randn(self.tokens, self.hidden).requires_grad_(), torch.randn(self.vocab, self.hidden), labels

    def test_full_logits_would_be_seen(self, recorded) -> None:
        hidden, weight, labels = self.inputs()
        with recorded() as work:
            full_cross_entropy(hidden, weight, labels).backward()
        assert work.largest == self.tokens * self.vocab * 4

    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_largest_tensor_is_a_chunk(self, recorded, options: dict[str, float], trained: bool) -> None:
        hidden, weight, labels = self.inputs()
        weight.requires_grad_(trained)
        with recorded() as work:
            linear_cross_entropy(hidden, weight, labels, chunk_tokens=self.chunk, **options).backward()
        assert work.largest == self.chunk * self.vocab * 4

    @pytest.mark.parametrize(
        ("hidden_trained", "weight_trained", "products"), [(True, True, 3), (True, False, 2), (False, True, 2)]
    )
    def test_only_needed_gradients_are_formed(
        self, recorded, hidden_trained: bool, weight_trained: bool, products: int
    ) -> None:
        hidden, weight, labels = self.inputs()
        hidden.requires_grad_(hidden_trained)
        weight.requires_grad_(weight_trained)
        with recorded() as work:
            linear_cross_entropy(hidden, weight, labels, chunk_tokens=self.chunk).backward()
        assert work.num_products == products * self.targets / self.chunk

    def test_no_gradient_under_no_grad(self, recorded) -> None:
        hidden, weight, labels = self.inputs()
        with torch.no_grad(), recorded() as work:
            loss = linear_cross_entropy(hidden, weight.requires_grad_(), labels, chunk_tokens=self.chunk)
        assert not loss.requires_grad
        assert work.num_products == self.targets / self.chunk

    def test_backward_takes_no_product(self, recorded) -> None:
        hidden, weight, labels = self.inputs()
        loss = linear_cross_entropy(hidden, weight.requires_grad_(), labels, chunk_tokens=self.chunk)
        with recorded() as work:
            loss.backward()
        assert work.num_products == 0


class TestBfloat16:
    def exact(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        loss = full_cross_entropy(*wide, labels)
        return loss, torch.autograd.grad(loss, wide)

    @pytest.mark.parametrize("chunk_tokens", [1, 16, None])
    def test_close_to_exact_however_it_is_cut(self, chunk_tokens: int | None) -> None:
        # 256 targets of one label: its row of the gradient is a sum of 256 terms, in which bfloat16 would lose most.
        hidden = (torch.randn(256, 64) + 1).bfloat16().requires_grad_()
        weight = (torch.randn(300, 64) * 0.1).bfloat16().requires_grad_()
        labels = torch.zeros(256, dtype=torch.int64)
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        expected, expected_gradients = self.exact(hidden, weight, labels)
        assert loss.dtype == torch.float32
        assert relative_error(loss, expected) < 1e-4
        for gradient, reference in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == torch.bfloat16
            assert relative_error(gradient, reference) < 3e-3
        assert relative_error(gradients[1][0], expected_gradients[1][0]) < 3e-3

    def test_autocast(self) -> None:
        hidden, weight, bias, labels = inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=4)
        cast = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
        assert torch.equal(loss, linear_cross_entropy(*cast, labels, bias=bias, chunk_tokens=4))
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        expected = torch.autograd.grad(full_cross_entropy(hidden, weight, labels, bias), (hidden, weight, bias))
        for gradient, reference in zip(gradients, expected, strict=True):
            assert gradient.dtype == torch.float32
            assert relative_error(gradient, reference) < 1e-2

    def test_autocast_does_not_lower_double(self) -> None:
        hidden, weight, _, labels = inputs(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, labels)
        torch.testing.assert_close(loss, full_cross_entropy(hidden, weight, labels))
        assert loss.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from dynamo itself
@pytest.mark.parametrize("trained", [False, True])
def test_compiled_without_a_graph_break(trained: bool) -> None:
    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(torch.tanh(hidden), weight, labels, chunk_tokens=4) / 2

    hidden, weight, _, labels = inputs()
    weight.requires_grad_(trained)
    given = [hidden, weight] if trained else [hidden]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    # Other labels, with another number of targets, go through the same graph.
    for batch_labels in (labels, labels.where(labels > 20, IGNORE_INDEX)):
        loss, expected = compiled(hidden, weight, batch_labels), function(hidden, weight, batch_labels)
        assert torch.equal(loss, expected)
        for gradient, reference in zip(
            torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True
        ):
            torch.testing.assert_close(gradient, reference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = inputs()
    on_device = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    loss = linear_cross_entropy(*on_device[:2], labels.cuda(), bias=on_device[2], softcap=5.0, chunk_tokens=4)
    expected = full_cross_entropy(hidden, weight, labels, bias, softcap=5.0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(loss.cpu(), expected) < tolerance
    gradients = torch.autograd.grad(loss, on_device)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        assert relative_error(gradient.cpu(), reference) < tolerance


class TestErrors:
    @pytest.mark.parametrize("label", [VOCAB, VOCAB + 5, -1])
    def test_label_outside_vocabulary_is_named(self, label: int) -> None:
        hidden, weight, _, labels = inputs()
        labels[1, 4] = label
        with pytest.raises(
            ValueError, match=rf"label {label} at position \[1, 4\] is outside the vocabulary of {VOCAB}"
        ):
            linear_cross_entropy(hidden, weight, labels)

    def test_shapes(self) -> None:
        hidden, weight, bias, labels = inputs()
        with pytest.raises(ValueError, match=r"hidden states \[3, 7, 16\] don't fit the output weight \[16, 50\]"):
            linear_cross_entropy(hidden, weight.t(), labels)
        with pytest.raises(ValueError, match=r"labels \[3, 6\] don't fit hidden states \[3, 7, 16\]"):
            linear_cross_entropy(hidden, weight, labels[:, 1:])
        with pytest.raises(ValueError, match=r"bias \[49\] doesn't fit a vocabulary of 50"):
            linear_cross_entropy(hidden, weight, labels, bias=bias[1:])

    def test_dtypes(self) -> None:
        hidden, weight, _, labels = inputs()
        with pytest.raises(
            ValueError, match=r"hidden states are torch\.float32 and the output weight is torch\.bfloat16"
        ):
            linear_cross_entropy(hidden, weight.bfloat16(), labels)
        with pytest.raises(ValueError, match=r"labels are torch\.int32"):
            linear_cross_entropy(hidden, weight, labels.int())

    @pytest.mark.parametrize(
        ("option", "value"),
        [("label_smoothing", 1.5), ("label_smoothing", -0.1), ("softcap", 0.0), ("chunk_tokens", 0)],
    )
    def test_options(self, option: str, value: float) -> None:
        hidden, weight, _, labels = inputs()
        with pytest.raises(ValueError, match=f"{option} is {value}"):
            linear_cross_entropy(hidden, weight, labels, **{option: value})
