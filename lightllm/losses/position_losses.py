"""The operator under the losses over the vocabulary: a loss per position, and gradients formed beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightllm.losses.output_head import LogitOptions, TargetLogits, block_length, softmax_dtype, spans


@torch.library.custom_op("lightllm::position_losses", mutates_args=())
def position_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    factors: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_tokens: int | None,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute each position's cross-entropy, and the gradients of their sum weighted by `factors`.

    It is an operator so that torch.compile keeps it whole: which positions are targets depends on values.

    Args:
        hidden: Hidden states `[..., hidden]`.
        weight: Output matrix `[vocab, hidden]`.
        bias: Bias of the logits `[vocab]`, or None.
        labels: Labels `[...]`.
        factors: Weights of the positions' losses in the gradients `[...]`, or None for 1.
        label_smoothing: As in `linear_cross_entropy`, like the next five.
        z_loss: Factor of the squared log normalizer.
        softcap: Bound of the logits' magnitude, or None.
        logit_scale: Factor of the logits before the softcap.
        ignore_index: Label of positions that are no target.
        chunk_tokens: Positions in a chunk, or None for the default.
        dtype: The dtype of the products.
        needs_hidden: Whether to form the gradient of `hidden`.
        needs_weight: Whether to form the gradient of `weight`.
        needs_bias: Whether to form the gradient of `bias`.

    Returns:
        The losses `[...]`, 0 where there is no target, and the gradients of hidden, weight and bias in their shapes
        and dtypes, `[0]` where they are not needed.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        options = LogitOptions(softcap, logit_scale, ignore_index, chunk_tokens, dtype)
        logits = TargetLogits(hidden, weight, bias, labels, options, needs_weight)
        needed = zip((hidden, weight, bias), (needs_hidden, needs_weight, needs_bias), strict=True)
        sums = GradientSums(logits, *(tensor if needs else None for tensor, needs in needed))
        target_factors = None if factors is None else factors.reshape(-1)[logits.positions]
        terms = _Terms(label_smoothing, z_loss, target_factors)
        losses = hidden.new_zeros(labels.shape, dtype=softmax_dtype(dtype))
        for chunk, product in logits.chunks():
            losses.view(-1)[logits.positions[chunk]] = _walk_blocks(logits, chunk, product, terms, sums)
            sums.add_product(chunk, product)
        return losses, *sums.tensors()


@position_losses.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_results(hidden, weight, bias, labels, *options[-4:])


def empty_results(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the operator returns, not filled in; the arguments are the operator's."""
    return (
        hidden.new_empty(labels.shape, dtype=softmax_dtype(dtype)),
        hidden.new_empty(hidden.shape) if needs_hidden else hidden.new_empty(0, dtype=dtype),
        weight.new_empty(weight.shape) if needs_weight else hidden.new_empty(0, dtype=dtype),
        bias.new_empty(bias.shape) if needs_bias and bias is not None else hidden.new_empty(0, dtype=dtype),
    )


def refuse_second_derivative(function: str) -> None:
    """Stop a backward pass that is asked for a graph of its own: gradients from the operator have none.

    Without this a penalty on such a gradient would silently do nothing.

    Args:
        function: Name of the loss, for the message.

    Raises:
        RuntimeError: if called in a backward pass with `create_graph=True`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function} is differentiable once and was asked for a second derivative (create_graph=True): "
            "for that, compute the loss from the full logits with torch.nn.functional.cross_entropy"
        )


def _walk_blocks(logits: TargetLogits, chunk: slice, product: Tensor, terms: _Terms, sums: GradientSums) -> Tensor:
    """Return the losses `[chunk]`; where gradients are needed, turn the product into the gradient by the product.

    Args:
        logits: The logits of the target positions.
        chunk: Which of the targets are in the chunk.
        product: The chunk's product `[chunk, vocab]`, overwritten.
        terms: What a loss is made of.
        sums: The gradients.
    """
    losses = product.new_empty(len(product), dtype=softmax_dtype(product.dtype))
    for block, block_logits in logits.blocks(product):
        rows = slice(chunk.start + block.start, chunk.start + block.stop)
        probabilities, log_normalizer = logits.normalize(block_logits)
        losses[block] = terms.losses(block_logits, logits.targets[rows], log_normalizer)
        if sums.needed:
            gradient = terms.gradient_(probabilities, logits.targets[rows], log_normalizer, rows)
            sums.add_logits(logits.head.chain_(gradient, block_logits))
            product[block] = gradient
    return losses


class _Terms(NamedTuple):
    """What a position's loss is made of; the formula is in `linear_cross_entropy`."""

    label_smoothing: float
    z_loss: float
    factors: Tensor | None
    """Weights of the losses in the gradients `[targets]`."""

    def losses(self, logits: Tensor, targets: Tensor, log_normalizer: Tensor) -> Tensor:
        """Return the losses `[block]` of logits `[block, vocab]`."""
        label_logits = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        losses = log_normalizer - (1.0 - self.label_smoothing) * label_logits
        if self.label_smoothing:
            losses = losses - self.label_smoothing * logits.mean(1)
        if self.z_loss:
            losses = losses + self.z_loss * log_normalizer.square()
        return losses

    def gradient_(self, probabilities: Tensor, targets: Tensor, log_normalizer: Tensor, rows: slice) -> Tensor:
        """Turn probabilities `[block, vocab]` into the gradient by the logits, in place.

        Of a position's loss it is `(1 + 2 z_loss lse) p_j - label_smoothing / vocab - (1 - label_smoothing) [j = y]`.

        Args:
            probabilities: Softmax of the logits `[block, vocab]`, overwritten.
            targets: Labels `[block]`.
            log_normalizer: `[block]`.
            rows: Which of the targets are in the block.
        """
        if self.z_loss:
            probabilities.mul_((1.0 + 2.0 * self.z_loss * log_normalizer).unsqueeze(1))
        if self.label_smoothing:
            probabilities.sub_(self.label_smoothing / probabilities.shape[1])
        probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1.0 - self.label_smoothing
        if self.factors is not None:
            probabilities.mul_(self.factors[rows].unsqueeze(1))
        return probabilities


class GradientSums:
    """The gradients of hidden states, weight and bias, summed over chunks.

    The weight's gradient is summed in its own dtype where there is one chunk, and in float32 where there are several,
    so that none is rounded away; the bias's always in float32.

    Args:
        logits: The logits of the target positions.
        hidden: Hidden states `[..., hidden]`, None where their gradient is not needed.
        weight: Output matrix `[vocab, hidden]`, or None.
        bias: Bias `[vocab]`, or None.
    """

    def __init__(self, logits: TargetLogits, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        self.needed = any(tensor is not None for tensor in (hidden, weight, bias))
        self._logits = logits
        self._dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        self._hidden = None if hidden is None else hidden.new_zeros(hidden.shape)
        self._weight: Tensor | None = None
        if weight is not None:
            dtype = softmax_dtype(weight.dtype) if logits.num_chunks > 1 else weight.dtype
            # The first chunk is written, not added.
            allocate = weight.new_empty if logits.num_chunks else weight.new_zeros
            self._weight = allocate(weight.shape, dtype=dtype)
        self._bias = None if bias is None else bias.new_zeros(bias.shape, dtype=softmax_dtype(bias.dtype))

    def add_logits(self, gradient: Tensor) -> None:
        """Add what a block's gradient by the product `[block, vocab]`, still in float32, gives the bias."""
        if self._bias is not None:
            self._bias.add_(gradient.sum(0))

    def add_product(self, chunk: slice, gradient: Tensor) -> None:
        """Add what a chunk's gradient by the product `[chunk, vocab]` gives hidden states and weight."""
        weight = self._logits.head.weight
        num_hidden = weight.shape[1]
        if self._hidden is not None:
            chunk_gradient = torch.mm(gradient, weight).to(self._hidden.dtype)
            self._hidden.view(-1, num_hidden)[self._logits.positions[chunk]] = chunk_gradient
        if self._weight is not None:
            hidden = self._logits.hidden[chunk]
            # In pieces, so that the product is still in the cache when it is added: half the time.
            for piece in spans(len(weight), block_length(num_hidden, weight.device)):
                summand = torch.mm(gradient[:, piece].t(), hidden)
                if chunk.start == 0:
                    self._weight[piece] = summand
                else:
                    self._weight[piece].add_(summand)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three gradients in the dtypes of their inputs, `[0]` where one is not needed."""
        hidden, weight, bias = (
            self._logits.hidden.new_empty(0) if total is None else total.to(dtype)
            for total, dtype in zip((self._hidden, self._weight, self._bias), self._dtypes, strict=True)
        )
        return hidden, weight, bias
