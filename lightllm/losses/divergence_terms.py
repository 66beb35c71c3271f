"""How far two distributions over the vocabulary are apart: a value per position, and its gradient by the logits.

With p the student's probabilities, q the teacher's, both `[positions, vocab]`, r = log p - log q and z the student's
logits. Where the value's derivative by p_j is g_j, that by z_j is p_j (g_j - sum_k p_k g_k). A mixture m is taken
through log(p / m), in which neither p nor q is divided by, so that probabilities which underflow do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Distributions(NamedTuple):
    """What a divergence is computed from; all of it may be overwritten."""

    student: Tensor
    """Probabilities p `[positions, vocab]`."""
    teacher: Tensor
    """Probabilities q `[positions, vocab]`; of another vocabulary for `universal`."""
    log_ratio: Tensor
    """r = log p - log q `[positions, vocab]`; of no meaning for `universal`."""
    labels: Tensor
    """`[positions]`."""


Terms = tuple[Tensor, Tensor]
"""Values `[positions]`, and their gradient by the student's logits `[positions, vocab]`."""


def forward_kl(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take KL(q || p) = sum q (log q - log p): the student covers all that the teacher does (arXiv:1503.02531)."""
    values = given.log_ratio.mul_(given.teacher).sum(1).neg_()
    return values, given.student.sub_(given.teacher)


def reverse_kl(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take KL(p || q) = sum p (log p - log q): the student keeps to what the teacher does (arXiv:2306.08543)."""
    return _expected(given.student, given.log_ratio)


def symmetric_kl(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take (KL(q || p) + KL(p || q)) / 2, half of Jeffreys' divergence."""
    forward = -(given.log_ratio * given.teacher).sum(1)
    values, gradient = _expected(given.student, given.log_ratio)
    return values.add_(forward).div_(2), gradient.add_(given.student).sub_(given.teacher).div_(2)


def jensen_shannon(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD, arXiv:2306.13649, equation 1)."""
    log_student_share = _log_share(given.log_ratio, teacher_weight=beta)
    teacher_part = (given.log_ratio.neg_().add_(log_student_share)).mul_(given.teacher).sum(1)
    values, gradient = _expected(given.student, log_student_share)
    return beta * teacher_part + (1.0 - beta) * values, gradient.mul_(1.0 - beta)


def skewed_kl(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take KL(q || m) with m = alpha q + (1 - alpha) p (DistiLLM, arXiv:2402.03898, equation 4)."""
    log_student_share = _log_share(given.log_ratio, teacher_weight=alpha)
    values = (log_student_share - given.log_ratio).mul_(given.teacher).sum(1)
    # p_j g_j = -(1 - alpha) q_j p_j / m_j
    gradient = log_student_share.exp_().mul_(given.teacher).mul_(alpha - 1.0)
    return values, gradient.sub_(given.student.mul_(gradient.sum(1, keepdim=True)))


def skewed_reverse_kl(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take KL(p || m) with m = alpha p + (1 - alpha) q (DistiLLM, arXiv:2402.03898, section 3.1)."""
    log_student_share = _log_share(given.log_ratio, teacher_weight=1.0 - alpha)
    values = (given.student * log_student_share).sum(1)
    # g_j = log(p_j / m_j) - alpha p_j / m_j
    derivative = log_student_share.sub_(log_student_share.exp().mul_(alpha))
    return values, _expected(given.student, derivative)[1]


def total_variation(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take sum |p - q| / 2, the largest difference of the probabilities of any event (arXiv:2307.15190)."""
    difference = given.student - given.teacher
    values = difference.abs().sum(1).div_(2)
    return values, _expected(given.student, difference.sign_().div_(2))[1]


def decoupled(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take alpha KL(b_q || b_p) + beta KL(q' || p') (DKD, arXiv:2203.08679, equation 7).

    b is the pair (probability of the label, of all others together), and p', q' are the distributions over the others.
    """
    rows, columns = torch.arange(len(given.labels), device=given.labels.device), given.labels
    student_label, teacher_label = given.student[rows, columns], given.teacher[rows, columns]
    label_ratio = given.log_ratio[rows, columns]
    # Summed, because 1 - p loses what is left of it where p is near 1.
    student_rest, teacher_rest = (_rest(p, rows, columns) for p in (given.student, given.teacher))
    rest_ratio = student_rest.log() - teacher_rest.log()
    student, teacher = given.student.div_(student_rest[:, None]), given.teacher.div_(teacher_rest[:, None])
    target = -teacher_label * label_ratio - teacher_rest * rest_ratio
    others = -(given.log_ratio.sub_(rest_ratio[:, None])).mul_(teacher).sum(1)
    factor = (teacher_label - student_label) * alpha
    gradient = student.mul_((beta + factor)[:, None]).sub_(teacher.mul_(beta))
    gradient[rows, columns] = -factor
    return alpha * target + beta * others, gradient


def universal(given: Distributions, alpha: float, beta: float) -> Terms:
    """Take sum |p - q| over both sorted by size, whichever tokens they are of (ULD, arXiv:2402.12030, equation 5).

    The vocabularies may have two sizes: the smaller one is filled up with tokens of probability 0.
    """
    student, order = given.student.sort(dim=1, descending=True)
    teacher = given.teacher.sort(dim=1, descending=True).values
    missing = student.shape[1] - teacher.shape[1]
    beyond = teacher[:, student.shape[1] :].sum(1)
    difference = student - torch.nn.functional.pad(teacher, (0, missing))  # which cuts where it is negative
    values = difference.abs().sum(1).add_(beyond)
    derivative = torch.empty_like(difference).scatter_(1, order, difference.sign_())
    return values, _expected(given.student, derivative)[1]


DIVERGENCES: dict[str, Callable[[Distributions, float, float], Terms]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
    "decoupled": decoupled,
    "universal": universal,
}
"""Each by its name; the arguments are the distributions, alpha and beta."""


class PositionTerms(NamedTuple):
    """What a position's value is made of; the formula is in `linear_divergence`."""

    kind: str
    temperature: float
    alpha: float
    beta: float
    cross_entropy: float

    def divergence(self, given: Distributions) -> tuple[Tensor, Tensor]:
        """Return the divergences `[block]` and their gradient by the logits that were divided by the temperature."""
        values, gradient = DIVERGENCES[self.kind](given, self.alpha, self.beta)
        if self.temperature != 1.0:
            values, gradient = values.mul_(self.temperature**2), gradient.mul_(self.temperature**2)
        return values, gradient

    def hard(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted cross-entropies `[block]` and their gradient by the divided logits."""
        log_probabilities = torch.log_softmax(logits * self.temperature, dim=1)
        label = log_probabilities.gather(1, labels[:, None])
        gradient = log_probabilities.exp_().scatter_add_(1, labels[:, None], torch.full_like(label, -1.0))
        return label.squeeze(1).mul_(-self.cross_entropy), gradient.mul_(self.cross_entropy * self.temperature)


def _expected(student: Tensor, values: Tensor) -> Terms:
    """Return E = sum_j p_j v_j, and p_j (v_j - E); overwrites `values`."""
    weighted = values.mul_(student)
    expected = weighted.sum(1)
    return expected, weighted.sub_(student * expected[:, None])


def _log_share(log_ratio: Tensor, teacher_weight: float) -> Tensor:
    """Return log(p / m) with m = w q + (1 - w) p, that is -log(w exp(-r) + (1 - w))."""
    scaled = math.log(teacher_weight) - log_ratio
    return torch.logaddexp(scaled, scaled.new_tensor(math.log1p(-teacher_weight)), out=scaled).neg_()


def _rest(probabilities: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the probability `[positions]` of all but the label, which is set to 0 in place."""
    probabilities[rows, columns] = 0.0
    return probabilities.sum(1).clamp_(min=torch.finfo(probabilities.dtype).tiny)
