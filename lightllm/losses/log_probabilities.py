"""The log probability of each label, differentiable; logits are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses.output_head import check_inputs, product_dtype
from lightllm.losses.position_losses import refuse_second_derivative
from lightllm.losses.vocabulary_parallel import LossOptions, VocabularyPart, losses_of_part, vocabulary_part


def linear_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Compute the log probability `z_y - log sum_j exp z_j` of each target position's label.

    The logits `z` are those of `linear_cross_entropy`. Positions may go into any function of them: the backward pass
    takes a gradient per position, computes the logits again, chunk by chunk, and forms the gradients of the inputs
    that require one. Neither pass holds `[tokens, vocab]`. Differentiable once (`create_graph=True` is refused).
    Under autocast the products take its dtype.

    Args:
        hidden: Hidden states `[..., hidden]`.
        weight: Output matrix `[vocab, hidden]`.
        labels: Token whose probability is asked for at each hidden state, int64 `[...]`.
        bias: Bias of the logits `[vocab]`.
        softcap: Bound of the logits' magnitude, or None.
        logit_scale: Factor of the logits before the softcap.
        ignore_index: Label of positions that are no target.
        chunk_tokens: Positions whose products are held at once, or None for a bounded buffer.

    Returns:
        Log probabilities `[...]`, float32 (float64 for double inputs), 0 where there is no target.

    Raises:
        ValueError: if shapes or dtypes don't fit together, an option is out of its range, or a label is outside the
            vocabulary.
    """
    check_inputs(hidden, weight, labels, bias, softcap, chunk_tokens)
    dtype = product_dtype(hidden, weight)
    options = LossOptions(0.0, 0.0, softcap, logit_scale, ignore_index, chunk_tokens, dtype)
    weight, bias, part = vocabulary_part(weight, bias)
    log_probabilities: Tensor = _LinearLogProbabilities.apply(hidden, weight, bias, labels, options, part)
    return log_probabilities


class _LinearLogProbabilities(torch.autograd.Function):
    """Minus `position_losses`, whose gradients weighted by minus the upstream gradient are the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: LossOptions,
        part: VocabularyPart | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options, ctx.part = options, part
        losses, *_ = losses_of_part(part, (hidden, weight, bias, labels), None, options, (False, False, False))
        return losses.neg()

    @staticmethod
    def backward(ctx: Any, grad_log_probabilities: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_log_probabilities")
        needs = ctx.needs_input_grad[:3]
        factors = grad_log_probabilities.neg()
        _, *gradients = losses_of_part(ctx.part, ctx.saved_tensors, factors, ctx.options, needs)
        needed = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return (*needed, None, None, None)
