"""Divergence of a student from the likeliest tokens of its teacher, straight from hidden states and the output head.

What is compared are k + 1 events: each of the teacher's k likeliest tokens, and all other tokens together. Putting
events together only brings distributions nearer to each other, so the value is at most the whole divergence; it is the
whole one where k is the vocabulary. The derivative by a token's logit is that by the logit of its event, times the
token's share of the event's probability, which is 1 but for the tail.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses.divergence import (
    Divergence,
    DivergenceKind,
    LogitTerms,
    check_cross_entropy,
    checked_network,
)
from lightllm.losses.divergence_terms import Distributions, PositionTerms
from lightllm.losses.output_head import LogitOptions, TargetLogits, product_dtype, softmax_dtype
from lightllm.losses.position_losses import GradientSums, empty_results, refuse_second_derivative
from lightllm.losses.top_tokens import TopTokens

FROM_TOP_TOKENS = ("forward_kl", "skewed_kl", "jensen_shannon", "total_variation")
"""Divergences that the teacher's likeliest tokens say: where it gives little, it can add little."""

_SMALLEST = 1e-30
"""Of the probability of a tail, so that it can be divided by."""


def check_from_top_tokens(kind: str) -> None:
    """Refuse a divergence that depends on what the teacher says of unlikely tokens.

    Raises:
        ValueError: It does.
    """
    if kind not in FROM_TOP_TOKENS:
        why = {
            "decoupled": "tells the label apart, which need not be among them",
            "universal": "compares all probabilities by their size",
        }.get(kind, "is an average over what the student finds likely, which need not be among them")
        raise ValueError(
            f"{kind} cannot be learned from a teacher's likeliest tokens: it {why}; take "
            f"{', '.join(FROM_TOP_TOKENS[:-1])} or {FROM_TOP_TOKENS[-1]}, or a live teacher"
        )


def linear_top_token_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TopTokens,
    labels: Tensor,
    *,
    kind: DivergenceKind = "forward_kl",
    temperature: float = 1.0,
    alpha: float | None = None,
    beta: float | None = None,
    cross_entropy: float = 0.0,
    num_tokens: int | None = None,
    student: LogitTerms = LogitTerms(),  # noqa: B008  # immutable
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum a divergence of the student from its teacher's likeliest tokens over target positions.

    As `linear_divergence`, with the distributions over the teacher's k likeliest tokens and all others together. The
    student's gradients are formed chunk by chunk in the forward pass. Differentiable once.

    Args:
        student_hidden: Hidden states `[..., hidden]`.
        student_weight: Output matrix `[vocab, hidden]`.
        teacher: The teacher's likeliest tokens at the target positions, in the order of the flattened labels, at the
            same temperature; its probabilities are made to sum to 1, so rounded ones will do.
        labels: As in `linear_divergence`, like all that follows.
        kind: One of `FROM_TOP_TOKENS`.
        temperature: By which the student's logits are divided, as the teacher's were; 1 for the cross-entropy.
        alpha: Option of some kinds.
        beta: Option of some kinds.
        cross_entropy: Weight of the cross-entropy, from the same product.
        num_tokens: Compare the first tokens only, where one tokenizer's vocabulary is padded to two sizes.
        student: Bias, softcap and scale of the student's logits.
        ignore_index: Label of positions that are no target.
        chunk_tokens: Positions whose products are held at once, or None for a bounded buffer.

    Returns:
        The sum over target positions, a float32 scalar (float64 for double inputs); 0 where there is no target.

    Raises:
        ValueError: if inputs don't fit together, the kind cannot be learned so, an option is out of its range, or a
            label is outside the vocabulary.
    """
    divergence = Divergence(kind, temperature, alpha, beta)
    check_from_top_tokens(kind)
    student_weight, student = checked_network(student_hidden, student_weight, student, labels, num_tokens, chunk_tokens)
    check_cross_entropy(cross_entropy)
    _check_teacher(teacher, int((labels != ignore_index).sum()), len(student_weight))
    dtype = product_dtype(student_hidden, student_weight)
    tensors = (student_hidden, student_weight, student.bias, *teacher, labels)
    options = (*divergence.arguments(), cross_entropy, *student[1:], ignore_index, chunk_tokens, dtype)
    loss: Tensor = _LinearTopTokenDivergence.apply(*tensors, torch.is_grad_enabled(), options)
    return loss


def _check_teacher(teacher: TopTokens, num_targets: int, vocab: int) -> None:
    k = teacher.ids.shape[-1]
    if teacher.ids.shape != (num_targets, k) or teacher.log_probabilities.shape != (num_targets, k):
        raise ValueError(
            f"the teacher's tokens {list(teacher.ids.shape)} and log probabilities "
            f"{list(teacher.log_probabilities.shape)} are not those of {num_targets} targets: give [targets, k]"
        )
    if teacher.log_tail.shape != (num_targets,):
        raise ValueError(f"the teacher's tail {list(teacher.log_tail.shape)} is not that of {num_targets} targets")
    if num_targets and not 0 <= int(teacher.ids.min()) <= (largest := int(teacher.ids.max())) < vocab:
        raise ValueError(f"the teacher knows token {largest} and the student {vocab} tokens only: they don't fit")


@torch.library.custom_op("lightllm::position_top_token_divergences", mutates_args=())
def position_top_token_divergences(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    ids: Tensor,
    log_probabilities: Tensor,
    log_tail: Tensor,
    labels: Tensor,
    kind: str,
    temperature: float,
    alpha: float,
    beta: float,
    cross_entropy: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_tokens: int | None,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute each position's divergence, and the gradients of their sum by the student's inputs.

    The arguments are those of `linear_top_token_divergence`, with the dtype of the product. Returns what
    `position_losses` does. It is an operator so that torch.compile keeps it whole.
    """
    with torch.autocast(student_hidden.device.type, enabled=False):
        cap, wide = None if softcap is None else softcap / temperature, softmax_dtype(dtype)
        options = LogitOptions(cap, logit_scale / temperature, ignore_index, chunk_tokens, dtype)
        student = TargetLogits(student_hidden, student_weight, student_bias, labels, options, needs_weight)
        needed = zip(
            (student_hidden, student_weight, student_bias), (needs_hidden, needs_weight, needs_bias), strict=True
        )
        sums = GradientSums(student, *(tensor if needs else None for tensor, needs in needed))
        terms = PositionTerms(kind, temperature, alpha, beta, cross_entropy)
        teacher = ids, _log_events(log_probabilities.to(wide), log_tail.to(wide))
        values = student_hidden.new_zeros(labels.shape, dtype=wide)
        for chunk, product in student.chunks():
            blocks = _walk_blocks(student, (teacher[0][chunk], teacher[1][chunk]), chunk, product, terms, sums)
            values.view(-1)[student.positions[chunk]] = blocks
            sums.add_product(chunk, product)
        return values, *sums.tensors()


@position_top_token_divergences.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    ids: Tensor,
    log_probabilities: Tensor,
    log_tail: Tensor,
    labels: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_results(student_hidden, student_weight, student_bias, labels, *options[-4:])


def _log_events(log_probabilities: Tensor, log_tail: Tensor) -> Tensor:
    """Return the log probabilities of the k + 1 events `[targets, k + 1]`, the tail last; they sum to 1."""
    tail = log_tail.clamp(min=math.log(_SMALLEST))
    return torch.cat([log_probabilities, tail[:, None]], dim=1).log_softmax(1)


def _walk_blocks(
    student: TargetLogits,
    teacher: tuple[Tensor, Tensor],
    chunk: slice,
    product: Tensor,
    terms: PositionTerms,
    sums: GradientSums,
) -> Tensor:
    """Return the values `[chunk]`; where gradients are needed, turn the product into that by the product.

    Args:
        student: The student's logits at the target positions.
        teacher: The teacher's likeliest tokens `[chunk, k]`, and the log probabilities of the events `[chunk, k + 1]`.
        chunk: Which of the targets are in the chunk.
        product: The chunk's product `[chunk, vocab]`, overwritten.
        terms: What a value is made of.
        sums: The gradients.
    """
    values = product.new_empty(len(product), dtype=softmax_dtype(product.dtype))
    for block, logits in student.blocks(product):
        labels = student.targets[chunk.start + block.start : chunk.start + block.stop]
        ids, log_teacher = (tensor[block] for tensor in teacher)
        probabilities, log_normalizer = student.normalize(logits)
        log_student = logits.gather(1, ids) - log_normalizer[:, None]
        # Summed without the others, because 1 - P loses what is left of it where P is near 1.
        tail = probabilities.scatter_(1, ids, 0.0).sum(1, keepdim=True).clamp_(min=_SMALLEST)
        log_student = torch.cat([log_student, tail.log()], dim=1)
        given = Distributions(log_student.exp(), log_teacher.exp(), log_student - log_teacher, labels)
        values[block], events = terms.divergence(given)
        if sums.needed:
            gradient = probabilities.mul_(events[:, -1:] / tail).scatter_(1, ids, events[:, :-1])
        if terms.cross_entropy:
            hard, hard_gradient = terms.hard(logits, labels)
            values[block] += hard
            if sums.needed:
                gradient.add_(hard_gradient)
        if sums.needed:
            gradient = student.head.chain_(gradient, logits)
            sums.add_logits(gradient)
            product[block] = gradient
    return values


class _LinearTopTokenDivergence(torch.autograd.Function):
    """The sum of `position_top_token_divergences`; its gradients wait for the backward pass, which scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        ids: Tensor,
        log_probabilities: Tensor,
        log_tail: Tensor,
        labels: Tensor,
        grad_enabled: bool,
        options: tuple[Any, ...],
    ) -> Tensor:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        student = (student_hidden, student_weight, student_bias)
        given = (*student, ids, log_probabilities, log_tail, labels)
        values, *gradients = position_top_token_divergences(*given, *options, *needs)
        ctx.save_for_backward(*gradients)
        return values.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_top_token_divergence")
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        return (*(gradient * grad_loss if needed else None for gradient, needed in gradients), *[None] * 6)
