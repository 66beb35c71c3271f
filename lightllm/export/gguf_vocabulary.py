"""A tokenizer as GGUF files spell it: what llama.cpp needs to cut text into the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SPLITS = {"gpt-2": None, "smollm": None, "llama-bpe": _LLAMA3_SPLIT, "qwen2": _QWEN2_SPLIT}
"""Names by which llama.cpp knows how text is cut before merging, and the expression that cuts, if it is one."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token in a GGUF file."""


class Vocabulary(NamedTuple):
    """What a GGUF file says of a byte-level BPE tokenizer."""

    tokens: list[str]
    """By token id; as many as the network's embedding has rows."""
    kinds: list[int]
    """`NORMAL`, `CONTROL`, `USER_DEFINED` or `UNUSED`, by token id."""
    merges: list[str]
    """Pairs of tokens with a space between, first to last."""
    split: str
    """A key of `SPLITS`."""


def vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Vocabulary:
    """Read a byte-level BPE tokenizer.

    Args:
        tokenizer: The tokenizer.
        num_rows: Rows of the network's embedding; those without a token become unused ones.

    Raises:
        ValueError: It is of another kind, or cuts text in a way that llama.cpp has no name for here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # not every tokenizer is one of the tokenizers package
    description = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    kind = description["model"]["type"]
    split = _split(description) if kind == "BPE" else None
    if backend is None or split is None:
        raise ValueError(
            f"a {kind} tokenizer that cuts text by {json.dumps(description.get('pre_tokenizer'))} cannot be written "
            f"into a GGUF file: only byte-level BPE of the kinds {', '.join(SPLITS)} can"
        )
    if len(tokenizer) > num_rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, more than the network's {num_rows}")
    tokens = [f"[PAD{index}]" for index in range(num_rows)]
    kinds = [UNUSED] * num_rows
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        tokens[index], kinds[index] = token, NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index], kinds[index] = added.content, CONTROL if added.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    return Vocabulary(tokens, kinds, merges, split)


def _split(description: dict[str, Any]) -> str | None:
    """The key of `SPLITS` that says how text is cut; None if there is none."""
    normalizer, cutter = description["normalizer"], description["pre_tokenizer"]
    # llama.cpp normalizes nothing; Qwen's composition of accents is left out there too.
    if cutter is None or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    parts: Sequence[dict[str, Any]] = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    *before, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return "gpt-2" if last["use_regex"] else None
    first = before[0]
    if len(before) == 1 and last["use_regex"]:
        return "smollm" if first["type"] == "Digits" and first["individual_digits"] else None
    if len(before) == 1 and first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]:
        return next((name for name, split in SPLITS.items() if split and split == first["pattern"].get("Regex")), None)
    return None
