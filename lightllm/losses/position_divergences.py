"""The operator under the divergences: a value per position, and the student's gradients formed beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightllm.losses.divergence_terms import Distributions, PositionTerms
from lightllm.losses.output_head import LogitOptions, TargetLogits, default_chunk_tokens, softmax_dtype
from lightllm.losses.position_losses import GradientSums, empty_results


@torch.library.custom_op("lightllm::position_divergences", mutates_args=())
def position_divergences(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    kind: str,
    temperature: float,
    alpha: float,
    beta: float,
    cross_entropy: float,
    student_softcap: float | None,
    student_logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    ignore_index: int,
    chunk_tokens: int | None,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute each position's divergence, and the gradients of their sum by the student's inputs.

    The arguments are those of `linear_divergence`, cut to one vocabulary, with the dtypes of the two products. Returns
    what `position_losses` does. It is an operator so that torch.compile keeps it whole.
    """
    with torch.autocast(student_hidden.device.type, enabled=False):
        # Both are cut alike, so that they are walked side by side.
        length = chunk_tokens or default_chunk_tokens(student_weight, needs_weight)
        # Divided by the temperature, softcap and scale make logits that are.
        caps = (None if cap is None else cap / temperature for cap in (student_softcap, teacher_softcap))
        scales = (student_logit_scale / temperature, teacher_logit_scale / temperature)
        widest = max(len(student_weight), len(teacher_weight))
        options, teacher_options = (
            LogitOptions(cap, scale, ignore_index, length, dtype, widest)
            for cap, scale, dtype in zip(caps, scales, (student_dtype, teacher_dtype), strict=True)
        )
        student = TargetLogits(student_hidden, student_weight, student_bias, labels, options, needs_weight)
        # Of the teacher's they only say where: with another vocabulary they are none of its tokens.
        where = labels if len(teacher_weight) == len(student_weight) else labels.where(labels == ignore_index, 0)
        teacher = TargetLogits(teacher_hidden, teacher_weight, teacher_bias, where, teacher_options, False)
        needed = zip(
            (student_hidden, student_weight, student_bias), (needs_hidden, needs_weight, needs_bias), strict=True
        )
        sums = GradientSums(student, *(tensor if needs else None for tensor, needs in needed))
        terms = PositionTerms(kind, temperature, alpha, beta, cross_entropy)
        values = student_hidden.new_zeros(labels.shape, dtype=softmax_dtype(student_dtype))
        for (chunk, product), (_, teacher_product) in zip(student.chunks(), teacher.chunks(), strict=True):
            blocks = _walk_blocks(student, teacher, chunk, (product, teacher_product), terms, sums)
            values.view(-1)[student.positions[chunk]] = blocks
            sums.add_product(chunk, product)
        return values, *sums.tensors()


@position_divergences.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student_dtype, _, *needs = options[-5:]
    return empty_results(student_hidden, student_weight, student_bias, labels, student_dtype, *needs)


def _walk_blocks(
    student: TargetLogits,
    teacher: TargetLogits,
    chunk: slice,
    products: tuple[Tensor, Tensor],
    terms: PositionTerms,
    sums: GradientSums,
) -> Tensor:
    """Return the values `[chunk]`; where gradients are needed, turn the student's product into that by the product.

    Args:
        student: The student's logits at the target positions.
        teacher: The teacher's.
        chunk: Which of the targets are in the chunk.
        products: The chunk's products of student and teacher `[chunk, vocab]`, overwritten.
        terms: What a value is made of.
        sums: The student's gradients.
    """
    values = products[0].new_empty(len(products[0]), dtype=softmax_dtype(products[0].dtype))
    pairs = zip(student.blocks(products[0]), teacher.blocks(products[1]), strict=True)
    for (block, logits), (_, teacher_logits) in pairs:
        labels = student.targets[chunk.start + block.start : chunk.start + block.stop]
        probabilities, log_normalizer = student.normalize(logits)
        teacher_probabilities, teacher_log_normalizer = teacher.normalize(teacher_logits)
        log_ratio = teacher_logits
        if terms.kind != "universal":
            torch.sub(logits, teacher_logits, out=log_ratio)
            log_ratio.sub_((log_normalizer - teacher_log_normalizer)[:, None])
        given = Distributions(probabilities, teacher_probabilities, log_ratio, labels)
        values[block], gradient = terms.divergence(given)
        if terms.cross_entropy:
            hard, hard_gradient = terms.hard(logits, labels)
            values[block] += hard
            gradient.add_(hard_gradient)
        if sums.needed:
            gradient = student.head.chain_(gradient, logits)
            sums.add_logits(gradient)
            products[0][block] = gradient
    return values
