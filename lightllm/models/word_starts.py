"""Which tokens begin a word: what masking whole words goes by."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightllm.models.token_bytes import SPACE, spelling_of

_BYTE_SPACES = "\u0120\u010a\u0109\u010d"
"""Space, line feed, tabulator and carriage return as byte-level vocabularies write them."""


def word_starts(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> Tensor:
    """Whether each token begins a word.

    Byte-level BPE and sentencepiece mark the space before a word, WordPiece the tokens that go on with one. Where words
    are closed by a mark instead, or not told at all, every token counts as a word.

    Args:
        tokenizer: Any transformers tokenizer.
        vocab_size: Rows of the network's embedding, where they are more than the tokenizer's tokens.

    Returns:
        bool `[vocab]`.
    """
    table = torch.ones(vocab_size or len(tokenizer), dtype=torch.bool)
    spelling, added = spelling_of(tokenizer), tokenizer.added_tokens_decoder
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    marked = any((piece or "").startswith(SPACE) for piece in pieces)
    for token_id, piece in enumerate(pieces):
        if token_id in added or piece is None:
            continue
        if spelling.byte_level:
            table[token_id] = piece[0] in _BYTE_SPACES
        elif marked:
            table[token_id] = piece.startswith(SPACE)
        elif spelling.prefix:
            table[token_id] = not piece.startswith(spelling.prefix)
    return table
