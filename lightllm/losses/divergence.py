"""Divergence of a student from its teacher, straight from hidden states and output heads, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses.divergence_terms import DIVERGENCES
from lightllm.losses.output_head import check_inputs, product_dtype
from lightllm.losses.position_divergences import position_divergences
from lightllm.losses.position_losses import refuse_second_derivative
from lightllm.losses.vocabulary_parallel import whole

DivergenceKind = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jensen_shannon",
    "skewed_kl",
    "skewed_reverse_kl",
    "total_variation",
    "decoupled",
    "universal",
]

_DEFAULTS: dict[str, dict[str, float]] = {
    "jensen_shannon": {"beta": 0.5},
    "skewed_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.1},
    "decoupled": {"alpha": 1.0, "beta": 1.0},
}
"""The options of each kind that has any."""


@dataclass(frozen=True)
class Divergence:
    """What the student's distribution is held to its teacher's by.

    Args:
        kind: Which divergence; with q the teacher's probabilities, p the student's and y the label:
            `forward_kl` KL(q || p) (arXiv:1503.02531); `reverse_kl` KL(p || q) (arXiv:2306.08543); `symmetric_kl`
            their mean; `jensen_shannon` beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
            (arXiv:2306.13649); `skewed_kl` KL(q || alpha q + (1 - alpha) p) and `skewed_reverse_kl`
            KL(p || alpha p + (1 - alpha) q) (arXiv:2402.03898); `total_variation` sum |p - q| / 2 (arXiv:2307.15190);
            `decoupled` alpha KL((q_y, 1 - q_y) || (p_y, 1 - p_y)) + beta KL(q || p over all tokens but y)
            (arXiv:2203.08679); `universal` sum |p - q| over both sorted by size, for a teacher with another tokenizer
            (arXiv:2402.12030).
        temperature: Both networks' logits are divided by it, and the divergence is multiplied by its square, so that
            gradients keep their size (arXiv:1503.02531, section 2).
        alpha: 0.1 for the skewed kinds, in (0, 1); 1 for `decoupled`, at least 0.
        beta: 0.5 for `jensen_shannon`, in (0, 1); 1 for `decoupled`, at least 0.

    Raises:
        ValueError: An unknown kind, an option that the kind does not have, or one out of its range.
    """

    kind: DivergenceKind = "forward_kl"
    temperature: float = 1.0
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.kind not in DIVERGENCES:
            raise ValueError(f"no divergence {self.kind!r}: there are {', '.join(DIVERGENCES)}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature is {self.temperature}: give a positive number")
        known = _DEFAULTS.get(self.kind, {})
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is None:
                continue
            if name not in known:
                raise ValueError(f"{self.kind} has no {name}, and {name} is {value}: leave it out")
            if not value >= 0.0 or (self.kind != "decoupled" and not 0.0 < value < 1.0):
                bounds = "at least 0" if self.kind == "decoupled" else "in (0, 1)"
                raise ValueError(f"{name} of {self.kind} is {value}: give a number {bounds}")

    def arguments(self) -> tuple[str, float, float, float]:
        """Return kind, temperature, alpha and beta: the kind's own where none is given, 0 where it has none."""
        known = {"alpha": 0.0, "beta": 0.0} | _DEFAULTS.get(self.kind, {})
        alpha, beta = (
            known[name] if given is None else given for name, given in (("alpha", self.alpha), ("beta", self.beta))
        )
        return self.kind, self.temperature, alpha, beta


class LogitTerms(NamedTuple):
    """What makes logits of the product of hidden states and weight, beside the weight: as in `linear_cross_entropy`."""

    bias: Tensor | None = None
    """`[vocab]`."""
    softcap: float | None = None
    logit_scale: float = 1.0


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    kind: DivergenceKind = "forward_kl",
    temperature: float = 1.0,
    alpha: float | None = None,
    beta: float | None = None,
    cross_entropy: float = 0.0,
    num_tokens: int | None = None,
    student: LogitTerms = LogitTerms(),  # noqa: B008  # immutable
    teacher: LogitTerms = LogitTerms(),  # noqa: B008
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum a divergence of student and teacher over target positions without ever holding either one's logits.

    With the student's logits z, the teacher's z' and the divergence D of `Divergence`, a target position adds

        temperature ** 2 * D(softmax(z / temperature), softmax(z' / temperature)) + cross_entropy * -log softmax(z)_y

    As in `linear_cross_entropy`, the student's gradients are formed chunk by chunk in the forward pass; the teacher
    gets none. Memory is `[chunk_tokens, vocab]` for each of the two and the gradients. Differentiable once.

    Args:
        student_hidden: Hidden states `[..., student's hidden]`.
        student_weight: Output matrix `[vocab, student's hidden]`.
        teacher_hidden: Hidden states `[..., teacher's hidden]`, of any dtype, which the teacher's weight shares.
        teacher_weight: Output matrix `[vocab, teacher's hidden]`; its vocabulary may be another for `universal` alone.
        labels: Token to predict at each position, int64 `[...]`, `ignore_index` where nothing is compared.
        kind: Which divergence: see `Divergence`, as for temperature, alpha and beta.
        temperature: Of both networks; 1 for the cross-entropy.
        alpha: Option of some kinds.
        beta: Option of some kinds.
        cross_entropy: Weight of the cross-entropy, from the same product.
        num_tokens: Compare the first tokens only, of a vocabulary padded to two sizes: no softmax has the others.
        student: Bias, softcap and scale of the student's logits.
        teacher: The same of the teacher's.
        ignore_index: Label of positions that are no target.
        chunk_tokens: Positions whose products are held at once, or None for a bounded buffer.

    Returns:
        The sum over target positions, a float32 scalar (float64 for double inputs); 0 where there is no target.

    Raises:
        ValueError: if inputs don't fit together, an option is out of its range, or a label is outside the vocabulary.
    """
    divergence = Divergence(kind, temperature, alpha, beta)
    student_weight, student = checked_network(student_hidden, student_weight, student, labels, num_tokens, chunk_tokens)
    teacher_weight, teacher = checked_network(teacher_hidden, teacher_weight, teacher, labels, num_tokens, chunk_tokens)
    check_cross_entropy(cross_entropy)
    _check_vocabularies(kind, len(student_weight), len(teacher_weight))
    dtypes = product_dtype(student_hidden, student_weight), product_dtype(teacher_hidden, teacher_weight)
    tensors = (student_hidden, student_weight, student.bias, teacher_hidden, teacher_weight, teacher.bias, labels)
    options = (*divergence.arguments(), cross_entropy, *student[1:], *teacher[1:], ignore_index, chunk_tokens, *dtypes)
    loss: Tensor = _LinearDivergence.apply(*tensors, torch.is_grad_enabled(), options)
    return loss


def checked_network(
    hidden: Tensor,
    weight: Tensor,
    terms: LogitTerms,
    labels: Tensor,
    num_tokens: int | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, LogitTerms]:
    """Check one network's inputs, and leave out what its head has for tokens from `num_tokens` on.

    A head whose rows lie on several ranks is gathered: a divergence looks at all tokens of a position together.

    Arguments and errors are those of `linear_divergence`.
    """
    check_inputs(hidden, weight, labels, terms.bias, terms.softcap, chunk_tokens)
    weight, terms = whole(weight), terms._replace(bias=None if terms.bias is None else whole(terms.bias))
    if num_tokens is None or num_tokens == len(weight):
        return weight, terms
    if not 0 < num_tokens < len(weight):
        raise ValueError(f"num_tokens is {num_tokens}, and an output weight is {list(weight.shape)}: lower it")
    return weight[:num_tokens], terms._replace(bias=None if terms.bias is None else terms.bias[:num_tokens])


def check_cross_entropy(cross_entropy: float) -> None:
    """Refuse a negative weight of the cross-entropy.

    Raises:
        ValueError: It is one.
    """
    if not cross_entropy >= 0.0:
        raise ValueError(f"cross_entropy is {cross_entropy}: give a weight of at least 0")


def _check_vocabularies(kind: str, student: int, teacher: int) -> None:
    if student != teacher and kind != "universal":
        raise ValueError(
            f"the student's vocabulary has {student} tokens and the teacher's {teacher}. If one tokenizer's is padded "
            f"to two sizes, give num_tokens ({min(student, teacher)} or the tokenizer's own number). If they are two "
            "tokenizers', only the kind universal compares them: take that, give the student the teacher's tokenizer, "
            "take a teacher with the student's, or train on the teacher's answers as text (FineTuning)"
        )


class _LinearDivergence(torch.autograd.Function):
    """The sum of `position_divergences`; its gradients wait for the backward pass, which scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        labels: Tensor,
        grad_enabled: bool,
        options: tuple[Any, ...],
    ) -> Tensor:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        student = (student_hidden, student_weight, student_bias)
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
        values, *gradients = position_divergences(*student, *teacher, labels, *options, *needs)
        ctx.save_for_backward(*gradients)
        return values.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_divergence")
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        return (*(gradient * grad_loss if needed else None for gradient, needed in gradients), *[None] * 6)
