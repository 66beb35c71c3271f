"""The output head, a chunk of target positions at a time: what every loss over the vocabulary shares.

The logits of a position with hidden state h are

    z = softcap * tanh(x / softcap),   x = logit_scale * (W h + b)

without the tanh where `softcap` is None. The product W h is taken in the dtype of the inputs for a chunk of
positions, into one buffer that all chunks share; everything after it is float32 (float64 for double inputs), for a
block of a few positions that stays in the processor's cache. Nothing of `[tokens, vocab]` is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the `[chunk, vocab]` product, and the positions that a chunk has at least: with fewer, reading the weight
# again for each chunk takes longer than multiplying by it. More of either gains a CPU nothing and leaves its cache.
_CHUNK_ELEMENTS = {"cpu": 2**23}
_CHUNK_ELEMENTS_ACCELERATOR = 2**27
_CHUNK_TOKENS = {"cpu": 256}
_CHUNK_TOKENS_ACCELERATOR = 1024

# Elements of a `[block, vocab]` float32 scratch tensor, and of a piece of the weight's gradient: 8 MiB stay in the
# last-level cache of a CPU; an accelerator only needs enough of them to hide the launches.
_BLOCK_ELEMENTS = {"cpu": 2**21}
_BLOCK_ELEMENTS_ACCELERATOR = 2**25


class OutputHead(NamedTuple):
    """The map from hidden states to logits."""

    weight: Tensor
    """`[vocab, hidden]`, in the dtype of the product."""
    bias: Tensor | None
    """`[vocab]` in the dtype of the softmax, or None."""
    softcap: float | None
    """Bound of the logits' magnitude, or None."""
    logit_scale: float
    """Factor of the logits before the softcap."""

    def transform_(self, product: Tensor) -> Tensor:
        """Turn products `W h` into logits in place, `[block, vocab]` in the dtype of the softmax."""
        if self.bias is not None:
            product.add_(self.bias)
        if self.logit_scale != 1.0:
            product.mul_(self.logit_scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def chain_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient by the logits `[block, vocab]` into that by the product, in place; uses the logits up.

        It takes `dz/dx = 1 - (z / softcap) ** 2`.
        """
        if self.softcap is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))
        if self.logit_scale != 1.0:
            gradient.mul_(self.logit_scale)
        return gradient


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    chunk_tokens: int | None,
) -> None:
    """Check that shapes fit together and options are in their range.

    Raises:
        ValueError: if hidden states, weight, labels or bias don't fit together, or `softcap` or `chunk_tokens` is not
            positive.
    """
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden.shape)} don't fit the output weight {list(weight.shape)}: "
            "give hidden [..., hidden] and weight [vocab, hidden]"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {list(labels.shape)} don't fit hidden states {list(hidden.shape)}: give one label per hidden state"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: give int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} doesn't fit a vocabulary of {weight.shape[0]}: give [vocab]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: give a positive number, or None for no softcap")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: give at least 1, or None for the default")


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the product of hidden states and weight: theirs, or autocast's where it is on.

    Raises:
        ValueError: if the dtypes differ and autocast is off.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden states are {hidden.dtype} and the output weight is {weight.dtype}: "
            "cast one to the other's dtype, or turn autocast on"
        )
    return hidden.dtype


def softmax_dtype(product: torch.dtype) -> torch.dtype:
    """Return the dtype of everything after the product: float64 for float64, float32 for the rest."""
    return torch.float64 if product == torch.float64 else torch.float32


def target_positions(labels: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Find the positions that have a target.

    Args:
        labels: `[...]`.
        vocab: Size of the vocabulary.
        ignore_index: The label of a position without a target.

    Returns:
        Indices into the flattened labels, and the labels there, both `[targets]`.

    Raises:
        ValueError: if a label is neither `ignore_index` nor in `[0, vocab)`.
    """
    flat = labels.reshape(-1)
    positions = (flat != ignore_index).nonzero().squeeze(1)
    targets = flat[positions]
    if targets.numel():
        low, high = torch.stack(torch.aminmax(targets)).tolist()
        if low < 0 or high >= vocab:
            first = ((targets < 0) | (targets >= vocab)).nonzero()[0]
            position = [int(axis) for axis in torch.unravel_index(positions[first], labels.shape)]
            raise ValueError(
                f"label {int(targets[first])} at position {position} is outside the vocabulary of {vocab}: "
                f"give labels in [0, {vocab}), or {ignore_index} where there is no target"
            )
    return positions, targets


def spans(total: int, largest: int) -> list[slice]:
    """Cut `range(total)` into the fewest slices of at most `largest`, as equal as possible."""
    count = -(-total // largest)
    return [slice(total * index // count, total * (index + 1) // count) for index in range(count)]


def default_chunk_tokens(weight: Tensor, needs_weight: bool) -> int:
    """Return how many positions a chunk takes so that its product is a small buffer and a fast product.

    Where the gradient of the weight is formed, the buffer may be as large as that gradient: each further chunk reads
    and writes all of it.

    Args:
        weight: Output matrix `[vocab, hidden]`.
        needs_weight: Whether its gradient is formed.
    """
    vocab, num_hidden = weight.shape
    elements = _CHUNK_ELEMENTS.get(weight.device.type, _CHUNK_ELEMENTS_ACCELERATOR)
    least = _CHUNK_TOKENS.get(weight.device.type, _CHUNK_TOKENS_ACCELERATOR)
    return max(elements // vocab, least, num_hidden if needs_weight else 0)


def block_length(width: int, device: torch.device) -> int:
    """Return how many rows of `width` elements are worked on at once outside the products."""
    return max(1, _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ACCELERATOR) // width)


class LogitOptions(NamedTuple):
    """How logits are made; all but the dtype as in `linear_cross_entropy`."""

    softcap: float | None
    logit_scale: float
    ignore_index: int
    chunk_tokens: int | None
    dtype: torch.dtype
    """The dtype of the products."""
    widest: int | None = None
    """Vocabulary that blocks are cut for, where logits over two of them are walked side by side; their own if None."""
    vocabulary: int | None = None
    """Tokens that a label may name, where the weight has the rows of some of them only; its rows if None."""


class TargetLogits:
    """The logits of the target positions, chunk by chunk and block by block, in buffers that are allocated once.

    Fresh memory costs a CPU more than the softmax in it, so chunks share one buffer for their product, and blocks one
    for their logits and one for their probabilities. What is yielded may be overwritten, and is valid until the next.

    Args:
        hidden: Hidden states `[..., hidden]`.
        weight: Output matrix `[vocab, hidden]`.
        bias: Bias of the logits `[vocab]`, or None.
        labels: Labels `[...]`.
        options: How logits are made.
        needs_weight: Whether the gradient of the weight will be formed.

    Attributes:
        positions: Indices of the targets in the flattened labels `[targets]`.
        targets: Their labels `[targets]`.
        hidden: Their hidden states `[targets, hidden]`, in the dtype of the products.
        head: The output head, its weight in that dtype too.
        num_chunks: How many chunks there are.

    Raises:
        ValueError: if a label is outside the vocabulary.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: LogitOptions,
        needs_weight: bool,
    ) -> None:
        vocab = len(weight)
        dtype, wide = options.dtype, softmax_dtype(options.dtype)
        self.positions, self.targets = target_positions(labels, options.vocabulary or vocab, options.ignore_index)
        self.hidden = hidden.flatten(0, -2)[self.positions].to(dtype)
        wide_bias = None if bias is None else bias.to(wide)
        self.head = OutputHead(weight.to(dtype), wide_bias, options.softcap, options.logit_scale)
        self._spans = spans(len(self.targets), options.chunk_tokens or default_chunk_tokens(weight, needs_weight))
        self.num_chunks = len(self._spans)
        longest = max((chunk.stop - chunk.start for chunk in self._spans), default=0)
        self._products = self.hidden.new_empty(longest, vocab)
        self._block_length = min(block_length(options.widest or vocab, hidden.device), longest)
        self._probabilities = self.hidden.new_empty(self._block_length, vocab, dtype=wide)
        # Where the product has the dtype of the logits already, it becomes them in place.
        self._logits = None if dtype == wide else torch.empty_like(self._probabilities)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield a chunk's positions and their product with the weight `[chunk, vocab]`."""
        for chunk in self._spans:
            product = self._products[: chunk.stop - chunk.start]
            torch.mm(self.hidden[chunk], self.head.weight.t(), out=product)
            yield chunk, product

    def blocks(self, product: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield a block's rows of a chunk's product and their logits `[block, vocab]`; overwrites a float32 product."""
        for block in spans(len(product), self._block_length):
            logits = product[block]
            if self._logits is not None:
                logits = self._logits[: len(logits)].copy_(logits)
            yield block, self.head.transform_(logits)

    def normalize(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a block's probabilities `[block, vocab]` and the log of the sum of its exponentials `[block]`.

        That log is the largest logit minus the log of the largest probability: two cheap passes, where
        `torch.logsumexp` would take the exponentials once more.
        """
        probabilities = self._probabilities[: len(logits)]
        torch.softmax(logits, dim=1, out=probabilities)
        return probabilities, logits.amax(1) - probabilities.amax(1).log()
