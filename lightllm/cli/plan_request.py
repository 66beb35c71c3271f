"""What the verb plan can be asked for. Nothing heavy is imported here: help is to be quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What is asked, beside the run's configuration."""

    hardware: str | None
    here: bool
    target_batch_tokens: int | None
    document_tokens: int | None
    write: str | None
    top: int
