"""Divergences from a teacher's likeliest tokens against the plain formula over k + 1 events, with autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import LogitTerms, TopTokens, linear_divergence, linear_top_token_divergence, linear_top_tokens
from lightllm.losses.divergence_terms import DIVERGENCES
from lightllm.losses.top_token_divergence import FROM_TOP_TOKENS, position_top_token_divergences

VOCAB, WIDTH, TEACHER_WIDTH = 50, 12, 20
OPTIONS = [
    *({"kind": kind} for kind in FROM_TOP_TOKENS),
    {"kind": "forward_kl", "temperature": 2.0},
    {"kind": "forward_kl", "cross_entropy": 0.3},
    {"kind": "jensen_shannon", "beta": 0.1, "temperature": 3.0, "cross_entropy": 1.0},
    {"kind": "skewed_kl", "alpha": 0.7},
]


def inputs(dtype: torch.dtype = torch.float32, rows: int = 3) -> list[Tensor]:
    """Hidden states and weight of student and teacher, and labels."""
    labels = torch.randint(0, VOCAB, (rows, 5))
    labels[0, :2] = IGNORE_INDEX
    return [
        torch.randn(rows, 5, WIDTH, dtype=dtype).requires_grad_(),
        (torch.randn(VOCAB, WIDTH, dtype=dtype) / 2).requires_grad_(),
        torch.randn(rows, 5, TEACHER_WIDTH, dtype=dtype),
        torch.randn(VOCAB, TEACHER_WIDTH, dtype=dtype) / 2,
        labels,
    ]


def of_events(logits: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the tokens with these ids and of all others together, `[targets, k + 1]`."""
    p = logits.softmax(-1)
    top = p.gather(1, ids)
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, ids, False)
    return torch.cat([top, (p * others).sum(1, keepdim=True)], 1)


def plain(student: Tensor, teacher: Tensor, k: int, labels: Tensor, **options: float) -> Tensor:
    """The formulas of `Divergence` over the events, for logits `[targets, vocab]`."""
    temperature, cross_entropy = options.pop("temperature", 1.0), options.pop("cross_entropy", 0.0)
    ids = teacher.topk(k, dim=1).indices
    q, p = of_events(teacher / temperature, ids), of_events(student / temperature, ids)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum()

    alpha, beta = options.get("alpha", 0.1), options.get("beta", 0.5)
    m = beta * q + (1 - beta) * p
    value = {
        "forward_kl": lambda: kl(q, p),
        "skewed_kl": lambda: kl(q, alpha * q + (1 - alpha) * p),
        "jensen_shannon": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "total_variation": lambda: (p - q).abs().sum() / 2,
    }[str(options["kind"])]()
    return temperature**2 * value + cross_entropy * F.cross_entropy(student, labels, reduction="sum")


def teacher_tokens(given: list[Tensor], k: int, temperature: float = 1.0) -> TopTokens:
    return linear_top_tokens(given[2], given[3], given[4], k, temperature=temperature)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_formula_over_events(options: dict, chunk_tokens: int | None) -> None:
    given = inputs()
    bias = torch.randn(VOCAB).requires_grad_()
    tokens = teacher_tokens(given, 6, options.get("temperature", 1.0))
    student = LogitTerms(bias, 3.0, 0.8)
    loss = linear_top_token_divergence(
        given[0], given[1], tokens, given[4], student=student, chunk_tokens=chunk_tokens, **options
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in (given[0], given[1], bias)]
    targets = given[4] != IGNORE_INDEX
    logits = 3.0 * torch.tanh(0.8 * F.linear(*wide) / 3.0)[targets]
    teacher = F.linear(given[2].double(), given[3].double())[targets]
    expected = plain(logits, teacher, 6, given[4][targets], **options)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0.0)
    gradients = torch.autograd.grad(loss / 3, (given[0], given[1], bias))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected / 3, wide), strict=True):
        assert (gradient - reference).norm() < 2e-6 * reference.norm()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict) -> None:
    given = inputs(torch.float64, rows=1)
    tokens = teacher_tokens(given, 4, options.get("temperature", 1.0))

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        terms = LogitTerms(bias, 4.0, 0.7)
        return linear_top_token_divergence(hidden, weight, tokens, given[4], student=terms, chunk_tokens=2, **options)

    bias = torch.randn(VOCAB, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (given[0], given[1], bias))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_tokens_are_the_whole_divergence(options: dict) -> None:
    given = inputs()
    tokens = teacher_tokens(given, VOCAB, options.get("temperature", 1.0))
    loss = linear_top_token_divergence(given[0], given[1], tokens, given[4], **options)
    whole = linear_divergence(*given, **options)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0.0)
    for gradient, expected in zip(*(torch.autograd.grad(one, given[:2]) for one in (loss, whole)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", FROM_TOP_TOKENS)
def test_more_tokens_come_nearer_to_the_whole_from_below(kind: str) -> None:
    given = inputs()
    whole = linear_divergence(*given, kind=kind)
    values = [
        float(linear_top_token_divergence(given[0], given[1], teacher_tokens(given, k), given[4], kind=kind).detach())
        for k in (1, 2, 5, 15, 35)
    ]
    assert values == sorted(values)
    assert 0 < values[0] < 0.9 * whole < values[-1] < whole


@pytest.mark.parametrize("kind", FROM_TOP_TOKENS)
def test_zero_at_equality_however_rounded(kind: str) -> None:
    given = inputs()
    same = [*given[:2], given[0].detach(), given[1].detach(), given[4]]
    ids, log_p, tail = teacher_tokens(same, 5)
    exact = linear_top_token_divergence(*same[:2], TopTokens(ids, log_p, tail), given[4], kind=kind)
    assert abs(float(exact.detach())) < 1e-5
    rounded = linear_top_token_divergence(*same[:2], TopTokens(ids, log_p.half(), tail.half()), given[4], kind=kind)
    assert 0 <= float(rounded.detach()) < 1e-2


def test_a_certain_teacher_and_a_certain_student_give_numbers() -> None:
    """No tail is left of either in float32."""
    given = inputs()
    sure = [200 * given[0].detach(), given[1].detach(), given[2], 200 * given[3], given[4]]
    for tensor in sure[:2]:
        tensor.requires_grad_()
    tokens = teacher_tokens(sure, 3)
    assert tokens.log_tail.isinf().any()
    for kind in FROM_TOP_TOKENS:
        loss = linear_top_token_divergence(*sure[:2], tokens, given[4], kind=kind, temperature=4.0)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, sure[:2]))


def test_first_tokens_of_a_padded_vocabulary() -> None:
    given = inputs()
    wider = torch.cat([given[1], torch.randn(6, WIDTH)]).detach().requires_grad_()
    tokens = teacher_tokens(given, 5)
    loss = linear_top_token_divergence(given[0], wider, tokens, given[4], num_tokens=VOCAB)
    assert torch.equal(loss, linear_top_token_divergence(given[0], given[1], tokens, given[4]))
    assert not torch.autograd.grad(loss, wider)[0][VOCAB:].any()


def test_without_targets() -> None:
    given = inputs()
    labels = torch.full_like(given[4], IGNORE_INDEX)
    loss = linear_top_token_divergence(given[0], given[1], linear_top_tokens(*given[2:4], labels, 3), labels)
    loss.backward()
    assert loss == 0.0
    assert not given[1].grad.any()


def test_largest_tensor_is_a_chunk(recorded) -> None:
    hidden, weight = torch.randn(96, 8).requires_grad_(), torch.randn(1000, 8)
    labels = torch.randint(0, 1000, (96,))
    tokens = linear_top_tokens(torch.randn(96, 8), weight, labels, 4)
    with recorded() as work:
        linear_top_token_divergence(hidden, weight, tokens, labels, chunk_tokens=8).backward()
    assert work.largest == 8 * 1000 * 4
    assert work.num_products == 2 * 12


@pytest.mark.parametrize("needs", [(False, False, False), (True, False, False), (True, True, True)])
def test_operator_contract(needs: tuple[bool, bool, bool]) -> None:
    given = inputs()
    tensors = (given[0].detach(), given[1].detach(), torch.randn(VOCAB), *teacher_tokens(given, 4), given[4])
    options = ("jensen_shannon", 2.0, 0.3, 0.6, 0.5, 3.0, 2.0, IGNORE_INDEX, 4, torch.float32)
    torch.library.opcheck(
        position_top_token_divergences, (*tensors, *options, *needs), test_utils=("test_schema", "test_faketensor")
    )


class TestRefusals:
    @pytest.mark.parametrize("kind", sorted(set(DIVERGENCES) - set(FROM_TOP_TOKENS)))
    def test_divergences_that_need_the_whole_teacher(self, kind: str) -> None:
        given = inputs()
        with pytest.raises(ValueError, match=f"{kind} cannot be learned from a teacher's likeliest tokens: it .* live"):
            linear_top_token_divergence(given[0], given[1], teacher_tokens(given, 4), given[4], kind=kind)

    def test_tokens_of_something_else(self) -> None:
        given = inputs()
        tokens = teacher_tokens(given, 4)
        with pytest.raises(ValueError, match=r"the teacher's tokens \[12, 4\] .* are not those of 13 targets"):
            linear_top_token_divergence(given[0], given[1], TopTokens(*(t[1:] for t in tokens)), given[4])
        with pytest.raises(ValueError, match=r"the teacher's tail \[12\] is not that of 13"):
            linear_top_token_divergence(given[0], given[1], tokens._replace(log_tail=tokens.log_tail[1:]), given[4])
        with pytest.raises(ValueError, match=r"the teacher knows token 50 and the student 50 tokens only"):
            linear_top_token_divergence(given[0], given[1], tokens._replace(ids=tokens.ids.clamp(min=50)), given[4])

    def test_second_derivative(self) -> None:
        given = inputs()
        loss = linear_top_token_divergence(given[0], given[1], teacher_tokens(given, 4), given[4])
        with pytest.raises(RuntimeError, match="linear_top_token_divergence is differentiable once"):
            torch.autograd.grad(loss, given[0], create_graph=True)
