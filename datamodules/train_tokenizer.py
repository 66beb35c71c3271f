"""A tokenizer of one's own: byte-level BPE, trained on the training source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a byte-level BPE tokenizer on the training source, once, into the cache."""

    vocab_size: int = 4096
    """Tokens, the 256 bytes and the special tokens included."""
