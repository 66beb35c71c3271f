"""What validation counts, without gradients: the sum of the losses, the number of targets, and the right guesses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses.output_head import LogitOptions, TargetLogits, check_inputs, product_dtype, softmax_dtype
from lightllm.losses.vocabulary_parallel import LossOptions, vocabulary_parallel_statistics, vocabulary_part


class TokenStatistics(NamedTuple):
    """Sums over the target positions of a batch, to be added over batches and ranks before dividing by `weight`."""

    loss_sum: Tensor
    """Sum of the cross-entropies in nats, a float32 scalar (float64 for double inputs)."""
    weight: Tensor
    """Number of target positions, an int64 scalar."""
    num_correct: Tensor
    """Number of target positions whose label has the largest logit (the first of equals), an int64 scalar."""


@torch.no_grad()
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int | None = None,
) -> TokenStatistics:
    """Sum cross-entropies and count right guesses over target positions, chunk by chunk, without gradients.

    Arguments and errors are those of `linear_log_probabilities`.
    """
    check_inputs(hidden, weight, labels, bias, softcap, chunk_tokens)
    dtype = product_dtype(hidden, weight)
    weight, bias, part = vocabulary_part(weight, bias)
    if part is not None:
        options = LossOptions(0.0, 0.0, softcap, logit_scale, ignore_index, chunk_tokens, dtype)
        return TokenStatistics(*vocabulary_parallel_statistics(part, (hidden, weight, bias, labels), options))
    return TokenStatistics(
        *_token_statistics(hidden, weight, bias, labels, softcap, logit_scale, ignore_index, chunk_tokens, dtype)
    )


@torch.library.custom_op("lightllm::token_statistics", mutates_args=())
def _token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_tokens: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    loss_sum = hidden.new_zeros((), dtype=softmax_dtype(dtype))
    num_correct = labels.new_zeros(())
    with torch.autocast(hidden.device.type, enabled=False):
        options = LogitOptions(softcap, logit_scale, ignore_index, chunk_tokens, dtype)
        logits = TargetLogits(hidden, weight, bias, labels, options, needs_weight=False)
        for chunk, product in logits.chunks():
            for block, block_logits in logits.blocks(product):
                targets = logits.targets[chunk][block]
                _, log_normalizer = logits.normalize(block_logits)
                loss_sum += (log_normalizer - block_logits.gather(1, targets.unsqueeze(1)).squeeze(1)).sum()
                num_correct += (block_logits.argmax(1) == targets).sum()
        return loss_sum, labels.new_tensor(len(logits.targets)), num_correct


@_token_statistics.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty((), dtype=softmax_dtype(options[-1])), labels.new_empty(()), labels.new_empty(())
