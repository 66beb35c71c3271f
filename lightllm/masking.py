"""Masking for masked language models: which tokens of a batch are to be predicted, and what stands in their place.

Pure functions of tensors and of uniform numbers in `[0, 1)`, four to a position, so that whoever calls decides where
the numbers come from: new ones for every training batch, and always the same ones for a document that is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch

PLANES = 4
"""Uniform numbers that a position takes: whether it is chosen, how long a span is, what stands there, which token."""


@dataclass(frozen=True)
class Masking:
    """How much is masked, and how.

    Raises:
        ValueError: A probability is out of its range, or spans have no length.
    """

    share: float = 0.15
    """Of the tokens that are no special ones, so many are to be predicted, on average."""
    units: Literal["tokens", "words", "spans"] = "tokens"
    """What is chosen as a whole: a token (BERT, arXiv:1810.04805), a word with all its tokens, or a span of words
    (SpanBERT, arXiv:1907.10529)."""
    mask: float = 0.8
    """Probability that a chosen token is replaced by the mask token."""
    random: float = 0.1
    """Probability that it is replaced by any ordinary token instead; else it stays what it is."""
    span_end: float = 0.2
    """A span ends with each of its words with this probability."""
    longest_span: int = 10
    """Words in a span at most; longer ones are drawn again."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"masking.share is {self.share}: give a number between 0 and 1 (0.15)")
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1:
            raise ValueError(
                f"masking.mask is {self.mask} and masking.random {self.random}: give two probabilities whose sum is "
                "at most 1 (0.8 and 0.1)"
            )
        if not 0 < self.span_end < 1 or self.longest_span < 1:
            raise ValueError(
                f"masking.span_end is {self.span_end} and masking.longest_span {self.longest_span}: give a probability "
                "between 0 and 1 (0.2) and at least one word (10)"
            )


class MaskedVocabulary(NamedTuple):
    """What masking knows of a vocabulary."""

    mask_token: int
    special: Tensor
    """Tokens that are never chosen, bool `[vocab]`."""
    begins_word: Tensor
    """Tokens that begin a word, bool `[vocab]`; only read where words are chosen."""


def mask_batch(batch: TextBatch, masking: Masking, vocabulary: MaskedVocabulary, uniforms: Tensor) -> TextBatch:
    """Choose positions, and replace the tokens there.

    Args:
        batch: Rows as they are; their labels are not read.
        masking: How.
        vocabulary: Of the tokens.
        uniforms: Numbers in `[0, 1)`, `[PLANES, batch, seq]`.

    Returns:
        The batch with other `input_ids`, and with `labels` that are the original tokens where they are to be predicted.
    """
    tokens = batch["input_ids"]
    chosen = choose(batch, masking, vocabulary, uniforms)
    ordinary = (~vocabulary.special).nonzero().flatten()
    drawn = ordinary[(uniforms[3] * len(ordinary)).long().clamp(max=len(ordinary) - 1)]
    masked = chosen & (uniforms[2] < masking.mask)
    replaced = chosen & ~masked & (uniforms[2] < masking.mask + masking.random)
    return TextBatch(
        input_ids=torch.where(replaced, drawn, tokens).masked_fill(masked, vocabulary.mask_token),
        labels=torch.where(chosen, tokens, IGNORE_INDEX),
        position_ids=batch["position_ids"],
        document_ids=batch["document_ids"],
    )


def choose(batch: TextBatch, masking: Masking, vocabulary: MaskedVocabulary, uniforms: Tensor) -> Tensor:
    """The positions to be predicted, bool `[batch, seq]`; arguments as those of `mask_batch`."""
    special = vocabulary.special[batch["input_ids"]]
    candidates = ~special & (batch["document_ids"] != PADDING_DOCUMENT)
    if masking.units == "tokens":
        return candidates & (uniforms[0] < masking.share)
    begins = vocabulary.begins_word[batch["input_ids"]] | special | (batch["position_ids"] == 0)
    begins[:, 1:] |= special[:, :-1]
    if masking.units == "words":
        places = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
        first = torch.where(begins, places, 0).cummax(1).values
        return candidates & (uniforms[0].gather(1, first) < masking.share)
    return candidates & _in_spans(begins, batch["position_ids"] == 0, masking, uniforms)


def _in_spans(begins_word: Tensor, begins_document: Tensor, masking: Masking, uniforms: Tensor) -> Tensor:
    """Whether a position's word is within so many words of one at which a span begins, in the same document.

    Spans may overlap, so that whether one begins at a word depends on nothing else: all of them are drawn at once.
    """
    word, document = begins_word.cumsum(1), begins_document.cumsum(1)
    stays = 1 - masking.span_end
    within_longest = 1 - stays**masking.longest_span
    length = 1 + (torch.log1p(-uniforms[1] * within_longest) / math.log(stays)).floor().long()
    starts = begins_word & (uniforms[0] < span_rate(masking))
    # The first word that no span reaches yet, counted so that it is larger in every later document of the row.
    width = begins_word.shape[1] + masking.longest_span + 1
    reached = torch.where(starts, document * width + (word + length).clamp(max=width - 1), 0).cummax(1).values
    return reached > document * width + word


def span_rate(masking: Masking) -> float:
    """Probability with which a span begins at a word, so that the share of words that are in any is `masking.share`.

    A word is in none if none begins at it, nor one of two words at the word before it, and so on.
    """
    stays, longest = 1 - masking.span_end, masking.longest_span
    at_least = [(stays**k - stays**longest) / (1 - stays**longest) for k in range(longest)]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        covered = 1 - math.prod(1 - middle * share for share in at_least)
        low, high = (middle, high) if covered < masking.share else (low, middle)
    return high


def fixed_uniforms(batch: TextBatch) -> Tensor:
    """Uniform numbers that depend on a position's document and on its place there, and on nothing else.

    So a document that is measured is masked the same way every time, however rows, batches and ranks are made up.

    Returns:
        float32 in `[0, 1)`, `[PLANES, batch, seq]`.
    """
    planes = torch.arange(1, PLANES + 1, device=batch["input_ids"].device)[:, None, None]
    # The finalizer of MurmurHash3 on a sum of odd multiples; int64 wraps around.
    mixed = batch["document_ids"] * 0x1E3779B97F4A7C15 + batch["position_ids"] * 0x2545F4914F6CDD1D
    mixed = mixed + planes * 0x3C6EF372FE94F82B
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        mixed = (mixed ^ _shifted(mixed)) * factor
    mixed = mixed ^ _shifted(mixed)
    return ((mixed >> 40) & 0xFFFFFF).float() / 2**24


def _shifted(value: Tensor) -> Tensor:
    """33 bits to the right, without the sign."""
    return (value >> 33) & 0x7FFFFFFF
