"""What an export says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    """The folder, or the GGUF file."""
    layout: str
    """`merged`, `adapter` or `gguf`."""
    dtype: str
    """Of the weights."""
    num_bytes: int
    """Of all files."""
    max_logit_difference: float | None
    """Between the export, loaded by plain transformers, and the network; None for an adapter, whose tensors are
    compared instead."""
    relative_logit_difference: float | None
    """The same as a share of the largest logit."""
