"""What an export says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MARKER = "export.json"
"""The report beside an exported folder's other files, by which the folder is known as an export."""


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
    sparsity: dict[str, Any] | None = None
    """See `sparsity_report`; None where nothing is pruned."""

    def write(self, folder: Path) -> None:
        """Leave the report in `folder`, with the export's name instead of its path, which others don't have."""
        (folder / MARKER).write_text(json.dumps({**asdict(self), "path": self.path.name}, indent=2) + "\n")

    def describe(self) -> str:
        """What was written, and how it compared when it was read back, in two lines."""
        written = f"written: {self.path} ({self.layout}, {self.dtype}, {self.num_bytes / 1e6:.1f} MB{self._zeros()})"
        if self.max_logit_difference is None or self.relative_logit_difference is None:
            return f"{written}\nread back: the tensors are the same"
        return (
            f"{written}\nread back: logits differ by {self.max_logit_difference:.2g} at most, "
            f"{self.relative_logit_difference:.2%} of the largest"
        )

    def _zeros(self) -> str:
        if self.sparsity is None:
            return ""
        structure, share, layers = (self.sparsity[name] for name in ("structure", "share", "layers"))
        return f", {share:.0%} of {layers} layers pruned, {structure}"
