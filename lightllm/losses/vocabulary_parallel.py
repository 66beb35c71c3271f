"""The losses over a vocabulary whose rows of the output matrix lie on several ranks.

Each rank makes the logits of its own tokens, a chunk of positions at a time. What is exchanged is, for each position,
the largest logit and three sums; for each hidden state, its gradient. Neither logits nor the matrix are gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.tensor import DTensor, Shard

from lightllm.losses.output_head import LogitOptions, TargetLogits, softmax_dtype
from lightllm.losses.position_losses import GradientSums, position_losses


class VocabularyPart(NamedTuple):
    """The tokens whose rows this rank has."""

    group: ProcessGroup
    begin: int
    """The first of them."""
    size: int
    """Of the whole vocabulary."""

    def own(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which rows `[chunk]` have their target among this rank's tokens, and the column it has there."""
        columns = targets - self.begin
        own = (columns >= 0) & (columns < logits.shape[1])
        return own, columns.clamp(0, logits.shape[1] - 1)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks, in place."""
        torch.distributed.all_reduce(values, ReduceOp.MAX, group=self.group)
        return values

    def smallest(self, values: Tensor) -> Tensor:
        """The smallest over ranks, in place."""
        torch.distributed.all_reduce(values, ReduceOp.MIN, group=self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        torch.distributed.all_reduce(values, group=self.group)
        return values


class LossOptions(NamedTuple):
    """What a loss is made of and how its logits are, in the order of `position_losses`."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    chunk_tokens: int | None
    dtype: torch.dtype

    def logits(self, vocabulary: int) -> LogitOptions:
        """Those of the logits."""
        return LogitOptions(*self[2:], vocabulary=vocabulary)


def vocabulary_part(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabularyPart | None]:
    """This rank's rows of an output matrix and its bias, and which they are; None where it has all of them.

    A matrix that lies on several ranks otherwise than by rows of equal number is gathered.
    """
    if not isinstance(weight, DTensor):
        return weight, bias, None
    if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        return whole(weight), None if bias is None else whole(bias), None
    mesh = weight.device_mesh
    rows = weight.to_local()
    part = VocabularyPart(mesh.get_group(), mesh.get_local_rank() * len(rows), len(weight))
    return rows, bias.to_local() if isinstance(bias, DTensor) else bias, part


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that lie on other ranks, differentiable: each rank takes its part of the gradient."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


def losses_of_part(
    part: VocabularyPart | None,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    factors: Tensor | None,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `vocabulary_parallel_losses`, or `position_losses` where this rank has the whole vocabulary."""
    if part is not None:
        return vocabulary_parallel_losses(part, tensors, factors, options, needs)
    hidden, weight, bias, labels = tensors
    found: tuple[Tensor, Tensor, Tensor, Tensor] = position_losses(
        hidden, weight, bias, labels, factors, *options, *needs
    )
    return found


def vocabulary_parallel_losses(
    part: VocabularyPart,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    factors: Tensor | None,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `position_losses` does, with the same results on all ranks but for the rows that each has.

    Args:
        part: Which tokens this rank has.
        tensors: Hidden states `[..., hidden]`, this rank's rows `[part, hidden]` and bias `[part]`, labels `[...]`.
        factors: Weights of the positions' losses in the gradients `[...]`, or None for 1.
        options: What a loss is made of.
        needs: Whether to form the gradients of hidden states, weight and bias.

    Returns:
        The losses `[...]`, 0 where there is no target, and the three gradients, `[0]` where they are not needed.
    """
    hidden, weight, bias, labels = tensors
    with torch.autocast(hidden.device.type, enabled=False):
        logits = TargetLogits(hidden, weight, bias, labels, options.logits(part.size), needs[1])
        needed = zip((hidden, weight, bias), needs, strict=True)
        sums = GradientSums(logits, *(tensor if needs_it else None for tensor, needs_it in needed))
        losses = hidden.new_zeros(labels.shape, dtype=softmax_dtype(options.dtype))
        flat_factors = None if factors is None else factors.reshape(-1)[logits.positions]
        for chunk, product in logits.chunks():
            values, gradient = _of_chunk(part, logits, chunk, product, options, sums.needed)
            losses.view(-1)[logits.positions[chunk]] = values
            if gradient is not None:
                if flat_factors is not None:
                    gradient.mul_(flat_factors[chunk].unsqueeze(1))
                sums.add_logits(gradient)
                sums.add_product(chunk, gradient.to(product.dtype))
        hidden_gradient, weight_gradient, bias_gradient = sums.tensors()
        if needs[0]:
            part.sum(hidden_gradient)
        return losses, hidden_gradient, weight_gradient, bias_gradient


def _of_chunk(
    part: VocabularyPart, logits: TargetLogits, chunk: slice, product: Tensor, options: LossOptions, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses `[chunk]` and the gradient of their sum by the product `[chunk, part]`."""
    values = logits.head.transform_(product.to(softmax_dtype(product.dtype)))
    targets, rows = logits.targets[chunk], torch.arange(len(values), device=values.device)
    own, columns = part.own(values, targets)
    largest = part.largest(values.amax(1))
    exponentials = (values - largest.unsqueeze(1)).exp_()
    total, label, mean = part.sum(
        torch.stack([exponentials.sum(1), values[rows, columns] * own, values.sum(1) / part.size])
    )
    log_normalizer = largest + total.log()
    smoothing = options.label_smoothing
    losses = log_normalizer - (1.0 - smoothing) * label - smoothing * mean
    losses = losses + options.z_loss * log_normalizer.square()
    if not needed:
        return losses, None
    gradient = exponentials.mul_(((1.0 + 2.0 * options.z_loss * log_normalizer) / total).unsqueeze(1))
    gradient.sub_(smoothing / part.size)
    gradient[rows, columns] -= own.to(gradient.dtype) * (1.0 - smoothing)
    return losses, logits.head.chain_(gradient, values)


def vocabulary_parallel_statistics(
    part: VocabularyPart, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor], options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum cross-entropies, count targets and right guesses, as `linear_token_statistics` does."""
    hidden, weight, bias, labels = tensors
    loss_sum = hidden.new_zeros((), dtype=softmax_dtype(options.dtype))
    num_correct = labels.new_zeros(())
    with torch.autocast(hidden.device.type, enabled=False):
        logits = TargetLogits(hidden, weight, bias, labels, options.logits(part.size), needs_weight=False)
        for chunk, product in logits.chunks():
            losses, _ = _of_chunk(part, logits, chunk, product.clone(), options, needed=False)
            loss_sum += losses.sum()
            values, columns = logits.head.transform_(product.to(loss_sum.dtype)).max(1)
            best = part.largest(values.clone())
            guesses = part.smallest(torch.where(values == best, columns + part.begin, part.size))
            num_correct += (guesses == logits.targets[chunk]).sum()
    return loss_sum, labels.new_tensor(len(logits.targets)), num_correct
