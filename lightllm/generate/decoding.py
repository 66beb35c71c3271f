"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen.

    Raises:
        ValueError: A value is out of its range.
    """

    max_new_tokens: int = 256
    """Tokens to generate at most; fewer where the network's positions end."""
    temperature: float = 0.0
    """Divides the logits before sampling; 0 takes the likeliest token every time."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability (arXiv:1904.09751)."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Makes tokens that were already there less likely; 1 is off (arXiv:1909.05858)."""
    seed: int | None = 0
    """Where the random numbers start; None gives others every time."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature is 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k is 0 (off) or more, not {self.top_k}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is above 0 (1 is off), not {self.repetition_penalty}")


GREEDY = Decoding()
"""The likeliest token, at most 256 times."""


def generation_settings(network: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Decoding) -> GenerationConfig:
    """`settings` in transformers' words: every choice is explicit, so that none of the model's own defaults remain."""
    from transformers import GenerationConfig

    from lightllm.models.stop_tokens import stop_token_ids

    stops = stop_token_ids(network, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if settings.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    return GenerationConfig(
        **sampling,
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=padding,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
