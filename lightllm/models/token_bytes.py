"""How many bytes of text each token stands for: what turns a loss per token into bits per byte.

Losses of networks with different vocabularies are comparable per byte and not per token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A byte that a sentencepiece vocabulary has no character for."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space in a sentencepiece vocabulary."""


def bytes_per_token(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None = None) -> Tensor:
    """UTF-8 bytes that each token stands for; special tokens stand for none.

    Byte-level BPE counts exactly: summed over a text's tokens, it is the text's bytes. Sentencepiece counts the space
    that it puts before a text too. WordPiece counts neither spaces nor what its normalization drops.

    Args:
        tokenizer: Any transformers tokenizer; without one, no token is known to stand for anything.
        vocab_size: Rows of the network's embedding, where they are more than the tokenizer's tokens.

    Returns:
        int64 `[vocab]`.

    Raises:
        ValueError: The tokenizer has more tokens than `vocab_size`.
    """
    if tokenizer is None:
        return torch.zeros(vocab_size or 0, dtype=torch.int64)
    num_tokens = len(tokenizer)
    if vocab_size is not None and vocab_size < num_tokens:
        raise ValueError(f"the tokenizer has {num_tokens} tokens, more than the network's {vocab_size}")
    table = torch.zeros(vocab_size or num_tokens, dtype=torch.int64)
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    spelling = spelling_of(tokenizer)
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(num_tokens)))):
        if token_id in special or token is None:
            continue
        if token_id in added:
            table[token_id] = 0 if added[token_id].special else len(added[token_id].content.encode())
        else:
            table[token_id] = _bytes_of_piece(token, spelling)
    return table


class Spelling(NamedTuple):
    """How a vocabulary writes its tokens."""

    byte_level: bool
    """Each character is a byte."""
    prefix: str
    """Marks a token that continues a word, and stands for nothing."""
    suffix: str
    """Marks the end of a word, and stands for the space after it."""


def _bytes_of_piece(token: str, spelling: Spelling) -> int:
    if spelling.byte_level:
        return len(token)
    if _BYTE_TOKEN.fullmatch(token):
        return 1
    token = token.removeprefix(spelling.prefix)
    if spelling.suffix and token.endswith(spelling.suffix):
        token = token.removesuffix(spelling.suffix) + " "
    return len(token.replace(SPACE, " ").encode())


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """How the vocabulary of a tokenizer writes its tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # not every tokenizer is one of the tokenizers package
    if backend is None:
        return Spelling(byte_level=False, prefix="", suffix="")
    description = json.loads(backend.to_str())
    kinds = {part["type"] for key in ("decoder", "pre_tokenizer") for part in _parts(description[key])}
    model = description["model"]
    return Spelling(
        byte_level="ByteLevel" in kinds,
        prefix=model.get("continuing_subword_prefix") or "",
        suffix=model.get("end_of_word_suffix") or "",
    )


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A decoder or pre-tokenizer, and the parts of a sequence of them."""
    if component is not None:
        yield component
        for part in [*component.get("decoders", []), *component.get("pretokenizers", [])]:
            yield from _parts(part)
