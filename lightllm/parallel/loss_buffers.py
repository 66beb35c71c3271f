"""What the chunked cross-entropy holds, by the sizes of its inputs: see `lightllm.losses.output_head`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightllm.losses.output_head import block_length, default_chunk_tokens, softmax_dtype


@dataclass(frozen=True)
class LossBuffers:
    """Bytes of the loss over the vocabulary, on one device."""

    forward: int
    """At its peak, beside hidden states and weights."""
    kept: int
    """From the forward to the backward pass: the gradients of hidden states and weight."""
    backward: int
    """What the backward pass adds to it: those gradients, scaled."""
    copies: int = 0
    """Of what is `forward`: the weight in the type of the products."""


def loss_buffers(
    num_positions: int,
    num_targets: int,
    head: torch.Tensor,
    hidden_dtype: torch.dtype,
    product_dtype: torch.dtype,
    trains_hidden: bool = True,
    num_parts: int = 1,
) -> LossBuffers:
    """Count the buffers of `linear_cross_entropy`.

    Args:
        num_positions: Positions of the micro-batch.
        num_targets: Those of them that have a target.
        head: The output matrix `[vocab, hidden]`: fake, on a CPU, or on the meta device for an accelerator. It trains
            if it requires a gradient.
        hidden_dtype: Of the hidden states.
        product_dtype: Of the products: autocast's, or the head's own.
        trains_hidden: Whether anything below the head trains.
        num_parts: Ranks that share the vocabulary, of which `head` is one's rows.
    """
    vocab, width = head.shape
    item, wide = product_dtype.itemsize, softmax_dtype(product_dtype).itemsize
    trains = head.requires_grad
    chunk = default_chunk_tokens(head, trains)
    num_chunks = -(-num_targets // chunk)
    longest = -(-num_targets // max(num_chunks, 1))
    block = min(block_length(vocab, head.device), longest)
    gathered = num_targets * width * item
    copies = vocab * width * item if product_dtype != head.dtype else 0
    products = longest * vocab * item + block * vocab * wide * (1 if item == wide else 2)
    if num_parts > 1:  # whole chunks of exponentials, and beside them logits and gradients where they are wider
        products += longest * vocab * (wide + (0 if item == wide else wide + item))
    hidden_gradient = num_positions * width * hidden_dtype.itemsize * trains_hidden
    weight_gradient = vocab * width * head.dtype.itemsize * trains
    summed = vocab * width * 4 * trains if num_chunks > 1 else weight_gradient
    piece = min(block_length(width, head.device), vocab) * width * item
    rounded = weight_gradient if trains and summed != weight_gradient else 0
    scratch = max(longest * width * item * trains_hidden, piece * trains, rounded)
    return LossBuffers(
        forward=gathered + copies + products + hidden_gradient + summed + scratch,
        kept=hidden_gradient + weight_gradient,
        backward=hidden_gradient + weight_gradient,
        copies=copies,
    )
