"""A pretrained network: a Hugging Face folder with a tiny network and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from tiny_networks import tiny_llama, tiny_tokenizer
from transformers import PreTrainedModel

from lightllm.models.progress import no_progress_bars


def saved(folder: Path, network: PreTrainedModel | None = None) -> str:
    """Save a network (a tiny llama if none is given) and the tiny tokenizer; return the folder's name."""
    with no_progress_bars():
        (network or tiny_llama()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
