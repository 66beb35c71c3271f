"""Cross-entropy straight from hidden states and the output head's weight; gradients are formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses.output_head import check_inputs, product_dtype
from lightllm.losses.position_losses import refuse_second_derivative
from lightllm.losses.vocabulary_parallel import LossOptions, VocabularyPart, losses_of_part, vocabulary_part


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum the cross-entropy over target positions without ever holding their logits.

    With the logits `z = softcap * tanh(logit_scale * (W h + b) / softcap)` of a target position (no tanh where
    `softcap` is None), `lse = log sum_j exp z_j` and `y` its label, the position adds

        (1 - label_smoothing) * (lse - z_y) + label_smoothing * (lse - mean_j z_j) + z_loss * lse ** 2

    Gradients are formed chunk by chunk in the forward pass, for the inputs that require one, and held instead of the
    logits: memory is `[chunk_tokens, vocab]` in the inputs' dtype, two blocks of a few positions in float32, and the
    gradients. Softmax and sums are float32 (float64 for double inputs); a bfloat16 weight's gradient is summed over
    chunks in float32. Differentiable once (`create_graph=True` is refused). Under autocast the products take its dtype.

    Args:
        hidden: Hidden states `[..., hidden]`.
        weight: Output matrix `[vocab, hidden]`, a tied embedding's or a frozen one's too: without `requires_grad` its
            gradient is not formed. A `DTensor` whose rows lie on several ranks stays there: each makes its own logits.
        labels: Token to predict from each hidden state, int64 `[...]`.
        bias: Bias of the logits `[vocab]`.
        label_smoothing: Share of the target's probability that is spread evenly over the vocabulary, in `[0, 1]`.
        z_loss: Factor of the squared log normalizer (PaLM, arXiv:2204.02311, section 5).
        softcap: Bound of the logits' magnitude (Gemma 2, arXiv:2408.00118, section 2), or None.
        logit_scale: Factor of the logits before the softcap.
        ignore_index: Label of positions that are no target.
        chunk_tokens: Positions whose products are held at once. None takes 2**23 elements, and 256 positions at
            least (2**27 and 1024 on an accelerator).

    Returns:
        The sum over target positions, a float32 scalar (float64 for double inputs); 0 where there is no target.

    Raises:
        ValueError: if shapes or dtypes don't fit together, an option is out of its range, or a label is outside the
            vocabulary.
    """
    check_inputs(hidden, weight, labels, bias, softcap, chunk_tokens)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: give a number in [0, 1]")
    dtype = product_dtype(hidden, weight)
    options = LossOptions(label_smoothing, z_loss, softcap, logit_scale, ignore_index, chunk_tokens, dtype)
    weight, bias, part = vocabulary_part(weight, bias)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, torch.is_grad_enabled(), options, part)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of `position_losses`; its gradients wait for the backward pass, which scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        grad_enabled: bool,
        options: LossOptions,
        part: VocabularyPart | None,
    ) -> Tensor:
        needs = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        losses, *gradients = losses_of_part(part, (hidden, weight, bias, labels), None, options, needs)
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        return (*(gradient * grad_loss if needed else None for gradient, needed in gradients), None, None, None, None)
