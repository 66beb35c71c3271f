"""How the next token is chosen.

Nothing heavy is imported here, not even for type checking: a command shows these fields in its help.
"""

from __future__ import annotations

from dataclasses import dataclass


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
