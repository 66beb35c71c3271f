"""Divergences from hidden states against the plain formulas on full logits, with autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import Divergence, LogitTerms, linear_cross_entropy, linear_divergence, output_head
from lightllm.losses.divergence_terms import DIVERGENCES

VOCAB, WIDTH, TEACHER_WIDTH = 50, 12, 20
OPTIONS = [
    *({"kind": kind} for kind in DIVERGENCES),
    {"kind": "forward_kl", "temperature": 2.0},
    {"kind": "reverse_kl", "temperature": 0.5, "cross_entropy": 0.3},
    {"kind": "jensen_shannon", "beta": 0.1, "temperature": 3.0},
    {"kind": "jensen_shannon", "beta": 0.9},
    {"kind": "skewed_kl", "alpha": 0.7, "cross_entropy": 1.0},
    {"kind": "skewed_reverse_kl", "alpha": 0.7},
    {"kind": "total_variation", "temperature": 2.0},
    {"kind": "universal", "temperature": 2.0, "cross_entropy": 0.4},
    {"kind": "decoupled", "alpha": 0.5, "beta": 3.0, "temperature": 2.0, "cross_entropy": 0.5},
]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def full_logits(hidden: Tensor, weight: Tensor, terms: LogitTerms) -> Tensor:
    logits = F.linear(hidden, weight, terms.bias) * terms.logit_scale
    return logits if terms.softcap is None else terms.softcap * torch.tanh(logits / terms.softcap)


def full_divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    kind: str,
    temperature: float = 1.0,
    alpha: float | None = None,
    beta: float | None = None,
    cross_entropy: float = 0.0,
) -> Tensor:
    """Sum the papers' formulas over logits `[..., vocab]`."""
    targets = labels != IGNORE_INDEX
    labels = labels[targets]
    p, q = (torch.softmax(logits[targets] / temperature, -1) for logits in (student, teacher.detach()))
    is_label = F.one_hot(labels, p.shape[-1]).bool()

    def decoupled(alpha: float, beta: float) -> Tensor:
        pairs = [torch.stack([one[is_label], one[~is_label].view(len(one), -1).sum(1)], 1) for one in (q, p)]
        others = [one[~is_label].view(len(one), -1) for one in (q, p)]
        return alpha * kl(*pairs) + beta * kl(*(one / one.sum(1, keepdim=True) for one in others))

    def jensen_shannon(beta: float) -> Tensor:
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)

    values = {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "symmetric_kl": lambda: (kl(p, q) + kl(q, p)) / 2,
        "jensen_shannon": lambda: jensen_shannon(0.5 if beta is None else beta),
        "skewed_kl": lambda: kl(q, (a := alpha or 0.1) * q + (1 - a) * p),
        "skewed_reverse_kl": lambda: kl(p, (a := alpha or 0.1) * p + (1 - a) * q),
        "total_variation": lambda: (p - q).abs().sum() / 2,
        "universal": lambda: (p.sort(-1).values - q.sort(-1).values).abs().sum(),
        "decoupled": lambda: decoupled(1.0 if alpha is None else alpha, 1.0 if beta is None else beta),
    }
    return temperature**2 * values[kind]() + cross_entropy * F.cross_entropy(student[targets], labels, reduction="sum")


def inputs(dtype: torch.dtype = torch.float32, rows: int = 3) -> list[Tensor]:
    """Hidden states and weight of student and teacher, and labels."""
    labels = torch.randint(0, VOCAB, (rows, 5))
    labels[0, :2] = IGNORE_INDEX
    labels[-1, -1] = IGNORE_INDEX
    return [
        torch.randn(rows, 5, WIDTH, dtype=dtype).requires_grad_(),
        (torch.randn(VOCAB, WIDTH, dtype=dtype) / 2).requires_grad_(),
        torch.randn(rows, 5, TEACHER_WIDTH, dtype=dtype),
        torch.randn(VOCAB, TEACHER_WIDTH, dtype=dtype) / 2,
        labels,
    ]


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_full_logits(options: dict, chunk_tokens: int | None) -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    bias = torch.randn(VOCAB).requires_grad_()
    student, teacher = LogitTerms(bias, 3.0, 0.8), LogitTerms(torch.randn(VOCAB), None, 1.2)
    loss = linear_divergence(
        *(hidden, weight, teacher_hidden, teacher_weight, labels),
        student=student,
        teacher=teacher,
        chunk_tokens=chunk_tokens,
        **options,
    )
    # In double, so that the reference's own rounding is not measured.
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = full_logits(*wide[:2], student._replace(bias=wide[2]))
    teacher = teacher._replace(bias=teacher.bias.double())
    teacher_logits = full_logits(teacher_hidden.double(), teacher_weight.double(), teacher)
    expected = full_divergence(logits, teacher_logits, labels, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-6
    gradients = torch.autograd.grad(loss / 3, (hidden, weight, bias))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected / 3, wide), strict=True):
        assert gradient.shape == reference.shape
        assert relative_error(gradient, reference) < 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict) -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float64, rows=1)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_divergence(
            *(hidden, weight, teacher_hidden, teacher_weight, labels),
            student=LogitTerms(bias, 4.0, 0.7),
            chunk_tokens=2,
            **options,
        )

    bias = torch.randn(VOCAB, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_zero_at_equality_and_positive_elsewhere(kind: str, temperature: float) -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float64)
    same = linear_divergence(hidden, weight, hidden, weight, labels, kind=kind, temperature=temperature)
    assert same.detach().abs() < 1e-12
    # (total variation has a kink there, whose subgradient is 0)
    for gradient in torch.autograd.grad(same, (hidden, weight)):
        assert gradient.abs().max() < 1e-12
    other = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels, kind=kind)
    assert other > 0.1


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_certain_networks_give_finite_numbers(kind: str) -> None:
    """With logits hundreds apart, most probabilities underflow."""
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    hidden = (hidden.detach() * 300).requires_grad_()
    loss = linear_divergence(hidden, weight, teacher_hidden * 300, teacher_weight, labels, kind=kind)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_teacher_gets_no_gradient_and_inputs_stay() -> None:
    given = inputs()
    before = [tensor.detach().clone() for tensor in given]
    for tensor in given[2:4]:
        tensor.requires_grad_()
    linear_divergence(*given, chunk_tokens=4).backward()
    hidden, _, teacher_hidden, teacher_weight, labels = given
    assert teacher_hidden.grad is None
    assert teacher_weight.grad is None
    assert (hidden.grad[labels == IGNORE_INDEX] == 0).all()
    assert (hidden.grad[labels != IGNORE_INDEX] != 0).any(-1).all()
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)


def test_cross_entropy_is_that_of_linear_cross_entropy() -> None:
    given = inputs()
    both = linear_divergence(*given, temperature=2.0, cross_entropy=0.25)
    apart = linear_divergence(*given, temperature=2.0) + 0.25 * linear_cross_entropy(*given[:2], given[-1])
    torch.testing.assert_close(both, apart, rtol=1e-6, atol=0.0)


def test_without_targets() -> None:
    *given, labels = inputs()
    loss = linear_divergence(*given, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss == 0.0
    assert not given[0].grad.any()
    assert not given[1].grad.any()


def test_teacher_of_another_dtype() -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    low = (teacher_hidden.bfloat16(), teacher_weight.bfloat16())
    loss = linear_divergence(hidden, weight, *low, labels)
    expected = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels)
    assert loss.dtype == torch.float32
    assert 0 < relative_error(loss, expected) < 2e-2


def test_autocast() -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_divergence(hidden, weight, teacher_hidden.bfloat16(), teacher_weight, labels)
    expected = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels)
    assert relative_error(loss, expected) < 2e-2
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


class TestPaddedVocabularies:
    def test_first_tokens_are_compared(self) -> None:
        hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
        wider = torch.cat([weight, torch.randn(6, WIDTH)]).detach().requires_grad_()
        bias = torch.randn(VOCAB + 6).requires_grad_()
        loss = linear_divergence(
            *(hidden, wider, teacher_hidden, teacher_weight, labels),
            num_tokens=VOCAB,
            cross_entropy=0.5,
            student=LogitTerms(bias),
        )
        first = LogitTerms(bias[:VOCAB])
        expected = linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, labels, cross_entropy=0.5, student=first
        )
        assert torch.equal(loss, expected)
        gradients = torch.autograd.grad(loss, (wider, bias))
        reference = torch.autograd.grad(expected, (weight, bias))
        torch.testing.assert_close(gradients[0][:VOCAB], reference[0])
        torch.testing.assert_close(gradients[1], reference[1])
        assert not gradients[0][VOCAB:].any()

    def test_two_sizes_are_refused_with_what_can_be_done(self) -> None:
        hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
        with pytest.raises(
            ValueError, match=r"has 50 tokens and the teacher's 44.*num_tokens \(44 .*universal.*FineTuning"
        ):
            linear_divergence(hidden, weight, teacher_hidden, teacher_weight[:44], labels % 44)
        with pytest.raises(ValueError, match=r"num_tokens is 47, and an output weight is \[44, 20\]"):
            linear_divergence(hidden, weight, teacher_hidden, teacher_weight[:44], labels % 44, num_tokens=47)


class TestTwoVocabularies:
    @pytest.mark.parametrize("teacher_vocab", [VOCAB - 13, VOCAB + 21])
    @pytest.mark.parametrize("chunk_tokens", [None, 3])
    def test_the_smaller_one_is_filled_up_with_nothing(self, teacher_vocab: int, chunk_tokens: int | None) -> None:
        hidden, weight, teacher_hidden, _, labels = inputs(torch.float64)
        teacher_weight = torch.randn(teacher_vocab, TEACHER_WIDTH, dtype=torch.float64)
        labels[1, 0] = VOCAB - 1
        given = (hidden, weight, teacher_hidden, teacher_weight, labels)
        loss = linear_divergence(*given, kind="universal", chunk_tokens=chunk_tokens)
        p, q = ((h @ w.t()).softmax(-1) for h, w in ((hidden, weight), (teacher_hidden, teacher_weight)))
        p, q = (F.pad(one, (0, 80 - one.shape[-1])).sort(-1, descending=True).values for one in (p, q))
        expected = (p - q).abs().sum(-1)[labels != IGNORE_INDEX].sum()
        torch.testing.assert_close(loss, expected)
        for gradient, reference in zip(
            *(torch.autograd.grad(one, (hidden, weight)) for one in (loss, expected)), strict=True
        ):
            torch.testing.assert_close(gradient, reference)

    def test_blocks_are_cut_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
        given = (hidden, weight, teacher_hidden, teacher_weight[:20], labels)
        whole = linear_divergence(*given, kind="universal")
        monkeypatch.setitem(output_head._BLOCK_ELEMENTS, "cpu", 2 * VOCAB)
        torch.testing.assert_close(linear_divergence(*given, kind="universal"), whole)


class TestWorkAndMemory:
    tokens, targets, vocab, chunk = 96, 64, 1000, 8

    def inputs(self) -> list[Tensor]:
        labels = torch.randint(0, self.vocab, (self.tokens,))
        labels[: self.tokens - self.targets] = IGNORE_INDEX
        return [
            torch.randn(self.tokens, 8).requires_grad_(),
            torch.randn(self.vocab, 8),
            torch.randn(self.tokens, 8),
            torch.randn(self.vocab, 8),
            labels,
        ]

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_largest_tensor_is_a_chunk(self, recorded, options: dict) -> None:
        given = self.inputs()
        with recorded() as work:
            linear_divergence(*given, chunk_tokens=self.chunk, **options).backward()
        # Sorting a block, which the chunk is here, also gives each token's place, in 8 bytes.
        assert work.largest == self.chunk * self.vocab * (8 if options["kind"] == "universal" else 4)

    @pytest.mark.parametrize(("trained", "products"), [(True, 4), (False, 3)])
    def test_only_needed_gradients_are_formed(self, recorded, trained: bool, products: int) -> None:
        given = self.inputs()
        given[1].requires_grad_(trained)
        with recorded() as work:
            linear_divergence(*given, chunk_tokens=self.chunk, cross_entropy=1.0)
        assert work.num_products == products * self.targets / self.chunk

    def test_no_gradient_under_no_grad(self, recorded) -> None:
        with torch.no_grad(), recorded() as work:
            loss = linear_divergence(*self.inputs(), chunk_tokens=self.chunk)
        assert not loss.requires_grad
        assert work.num_products == 2 * self.targets / self.chunk


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from dynamo itself
def test_compiled_without_a_graph_break() -> None:
    def function(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return linear_divergence(torch.tanh(hidden), weight, *rest, chunk_tokens=4, temperature=2.0) / 2

    given = inputs()
    loss, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(*given), function(*given)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, given[:2]), torch.autograd.grad(expected, given[:2]))


def test_second_derivative_is_refused() -> None:
    given = inputs()
    with pytest.raises(RuntimeError, match="linear_divergence is differentiable once"):
        torch.autograd.grad(linear_divergence(*given), given[0], create_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_cuda(kind: str) -> None:
    given = inputs()
    on_device = [tensor.detach().cuda() for tensor in given]
    loss = linear_divergence(on_device[0].requires_grad_(), *on_device[1:], kind=kind, chunk_tokens=4)
    expected = linear_divergence(*given, kind=kind)
    assert relative_error(loss.cpu(), expected) < 1e-5
    gradient = torch.autograd.grad(loss, on_device[0])[0].cpu()
    assert relative_error(gradient, torch.autograd.grad(expected, given[0])[0]) < 1e-5


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "kl"}, "no divergence 'kl': there are forward_kl, reverse_kl"),
            ({"temperature": 0.0}, "temperature is 0.0"),
            ({"alpha": 0.5}, "forward_kl has no alpha"),
            ({"kind": "skewed_kl", "beta": 0.5}, "skewed_kl has no beta"),
            ({"kind": "jensen_shannon", "beta": 1.0}, r"beta of jensen_shannon is 1.0: give a number in \(0, 1\)"),
            ({"kind": "skewed_kl", "alpha": 0.0}, "alpha of skewed_kl is 0.0"),
            ({"kind": "decoupled", "beta": -1.0}, "beta of decoupled is -1.0: give a number at least 0"),
            ({"kind": "decoupled", "beta": math.nan}, "beta of decoupled is nan"),
        ],
    )
    def test_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Divergence(**options)
        with pytest.raises(ValueError, match=message):
            linear_divergence(*inputs(), **options)

    def test_negative_cross_entropy(self) -> None:
        with pytest.raises(ValueError, match=r"cross_entropy is -1\.0"):
            linear_divergence(*inputs(), cross_entropy=-1.0)
