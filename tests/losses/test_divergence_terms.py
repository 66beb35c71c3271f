"""Properties of the divergences by themselves; their formulas are tested through `linear_divergence`."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from lightllm.losses.divergence import DivergenceKind
from lightllm.losses.divergence_terms import DIVERGENCES, Distributions, Terms


def terms(kind: str, student: Tensor, teacher: Tensor, alpha: float = 0.3, beta: float = 0.6) -> Terms:
    p, q = torch.softmax(student, 1), torch.softmax(teacher, 1)
    labels = torch.arange(len(student))
    return DIVERGENCES[kind](Distributions(p, q, p.log() - q.log(), labels), alpha, beta)


def test_the_table_is_the_type() -> None:
    assert tuple(DIVERGENCES) == get_args(DivergenceKind)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradient_is_orthogonal_to_a_shift_of_the_logits(kind: str) -> None:
    """Softmax does not see a constant that is added to all logits."""
    _, gradient = terms(kind, torch.randn(4, 9).double(), torch.randn(4, 9).double())
    assert gradient.sum(1).abs().max() < 1e-14
    assert gradient.abs().max() > 1e-3


def test_jensen_shannon_turns_into_the_kls_at_its_ends() -> None:
    """Divided by its weight (GKD, arXiv:2306.13649, section 2)."""
    student, teacher = torch.randn(3, 9).double(), torch.randn(3, 9).double()
    for beta, kind, weight in ((1e-6, "forward_kl", 1e-6), (1 - 1e-6, "reverse_kl", 1e-6)):
        values, _ = terms("jensen_shannon", student, teacher, beta=beta)
        torch.testing.assert_close(values / weight, terms(kind, student, teacher)[0], rtol=1e-4, atol=0.0)


def test_decoupled_is_forward_kl_where_beta_is_the_teachers_doubt() -> None:
    """KL = TCKD + (1 - q_y) NCKD (DKD, arXiv:2203.08679, equation 5)."""
    student, teacher = torch.randn(1, 9).double(), torch.randn(1, 9).double()
    doubt = 1 - float(torch.softmax(teacher, 1)[0, 0])
    values, gradient = terms("decoupled", student, teacher, alpha=1.0, beta=doubt)
    expected, expected_gradient = terms("forward_kl", student, teacher)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, expected_gradient)
