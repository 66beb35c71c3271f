"""The likeliest tokens of every target position: what is kept of a teacher's distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX
from lightllm.losses.output_head import LogitOptions, TargetLogits, check_inputs, product_dtype, softmax_dtype
from lightllm.losses.vocabulary_parallel import whole


class TopTokens(NamedTuple):
    """A distribution's k likeliest tokens, and how much is left for all others, at each target position."""

    ids: Tensor
    """The tokens, int64 `[targets, k]`, the likeliest first."""
    log_probabilities: Tensor
    """Of each `[targets, k]`, in nats."""
    log_tail: Tensor
    """Log of the probability of all other tokens together `[targets]`; minus infinity where there are none."""


@torch.no_grad()
def linear_top_tokens(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int | None = None,
) -> TopTokens:
    """Find the k likeliest tokens at every target position, chunk by chunk, without gradients.

    Args:
        hidden: Hidden states `[..., hidden]`.
        weight: Output matrix `[vocab, hidden]`.
        labels: int64 `[...]`, `ignore_index` at positions that are left out.
        k: How many tokens, at most the vocabulary.
        temperature: By which the logits are divided.
        bias: As in `linear_cross_entropy`, like the next four.
        softcap: Bound of the logits' magnitude, or None.
        logit_scale: Factor of the logits before the softcap.
        ignore_index: Label of positions that are no target.
        chunk_tokens: Positions whose products are held at once, or None for the default.

    Returns:
        Those of the target positions, in the order of the flattened labels; float32 (float64 for double inputs).

    Raises:
        ValueError: if inputs don't fit together, or an option is out of its range.
    """
    check_inputs(hidden, weight, labels, bias, softcap, chunk_tokens)
    weight, bias = whole(weight), None if bias is None else whole(bias)
    if not 1 <= k <= len(weight):
        raise ValueError(f"k is {k}: give a number of tokens from 1 to the vocabulary's {len(weight)}")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}: give a positive number")
    dtype = product_dtype(hidden, weight)
    parts: list[TopTokens] = []
    with torch.autocast(hidden.device.type, enabled=False):
        cap = None if softcap is None else softcap / temperature
        options = LogitOptions(cap, logit_scale / temperature, ignore_index, chunk_tokens, dtype)
        logits = TargetLogits(hidden, weight, bias, labels, options, needs_weight=False)
        for _, product in logits.chunks():
            for _, block_logits in logits.blocks(product):
                probabilities, log_normalizer = logits.normalize(block_logits)
                top = block_logits.topk(k, dim=1)
                # What is left is summed, because 1 - p loses it where p is near 1.
                tail = probabilities.scatter_(1, top.indices, 0.0).sum(1)
                parts.append(TopTokens(top.indices, top.values - log_normalizer[:, None], tail.log()))
        if not parts:
            empty = hidden.new_empty(0, k, dtype=softmax_dtype(dtype))
            return TopTokens(labels.new_empty(0, k), empty, empty.new_empty(0))
    return TopTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
