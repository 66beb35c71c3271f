"""The compression ledger: what every step of compressing a network saved, and what it cost.

One row a network: as it came, after each step, as it was trained, and as each file that was exported holds it. The rows
are kept in `RUN/ledger.jsonl`, where a step at the same training step has one row, however often a run is resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

REFERENCE = "dense"
"""The step that all others are compared with: the network before anything was done to it."""
TEACHER = "teacher"
TRAINED = "trained"
"""The network at the end of training."""


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """A network at one step. What was not measured is None."""

    step: str
    """`dense`, `teacher`, the name of a transformation that was just made, `trained`, or the name of an exported file
    in the run folder."""
    training_step: int | None
    """Optimizer steps that were taken before it; None for a file, of which the newest counts."""
    parameters: int
    """Weights of the network as a plain one, with any adapter merged; one that is used twice counts once."""
    nonzero_parameters: int
    """Those of them that are not zero."""
    weight_bytes: int
    """Bytes of the weights: in the network's dtype; of an export, those of its files of weights on the disk."""
    loss: float | None = None
    """Nats per target token of the validation documents."""
    target_tokens: int | None = None
    """Target tokens that the loss is a mean over."""
    tokens_per_second: float | None = None
    """Of generation: one row, greedy, with a cache of keys and values; the median of several."""
    peak_memory: int | None = None
    """Bytes that loading and generating takes at most, in a process of its own, beyond its interpreter and libraries:
    resident memory on a CPU, allocated memory of the device elsewhere."""
    device: str | None = None
    """On what generation was measured."""

    @property
    def key(self) -> tuple[str, int | None]:
        """By what a row is found: there is one of each key."""
        return self.step, self.training_step

    def shows_the_network_of(self, other: LedgerRow) -> bool:
        """Whether both are rows of the same network, as far as its weights and its loss tell."""
        names = ("parameters", "nonzero_parameters", "weight_bytes", "loss", "target_tokens")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with whatever scales and zero points belong to them."""
        return 8 * self.weight_bytes / self.parameters


RATIOS = ("parameters", "nonzero_parameters", "weight_bytes", "tokens_per_second", "peak_memory")
"""What is compared with the dense row by division; the loss is by difference."""


def ratios(row: LedgerRow, dense: LedgerRow) -> dict[str, float | None]:
    """How a row compares with the dense one: quotients of `RATIOS`, and `loss_increase` in nats."""
    values = asdict(row), asdict(dense)
    found: dict[str, float | None] = {
        f"{name}_ratio": values[0][name] / values[1][name] if values[0][name] is not None and values[1][name] else None
        for name in RATIOS
    }
    both = row.loss is not None and dense.loss is not None
    found["loss_increase"] = row.loss - dense.loss if both else None  # type: ignore[operator]  # neither is None
    return found


def reference(rows: list[LedgerRow]) -> LedgerRow | None:
    """The dense row, if there is one."""
    return next((row for row in rows if row.step == REFERENCE), None)


def as_records(rows: list[LedgerRow]) -> list[dict[str, Any]]:
    """The rows with bits per weight and, where there is a dense row, their ratios to it: plain values for a file."""
    dense = reference(rows)
    return [
        {**asdict(row), "bits_per_weight": row.bits_per_weight, **({} if dense is None else ratios(row, dense))}
        for row in rows
    ]


class Ledger:
    """The rows of a run on disk; each change replaces the file at once and whole.

    Args:
        path: The file, which need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def rows(self) -> list[LedgerRow]:
        """In the order in which they were first written.

        Raises:
            ValueError: A line is no row of a ledger.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [_row(line, f"{self.path}:{number}") for number, line in enumerate(lines, 1)]

    def add(self, row: LedgerRow) -> None:
        """Append a row, or put it in the place of the one with its key."""
        rows = {one.key: one for one in self.rows}
        self._write([*({**rows, row.key: row}).values()])

    def rewind(self, training_step: int) -> None:
        """Drop what was written after a training step: a run that is resumed there writes it again."""
        kept = [row for row in self.rows if row.training_step is None or row.training_step <= training_step]
        if len(kept) < len(self.rows):
            self._write(kept)

    def keep(self, keys: Collection[tuple[str, int | None]]) -> None:
        """Drop all rows but those of some keys: what an earlier run left in the folder."""
        kept = [row for row in self.rows if row.key in keys]
        if len(kept) < len(self.rows):
            self._write(kept)

    def _write(self, rows: list[LedgerRow]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path)


_NAMES = {field.name for field in fields(LedgerRow)}


def _row(line: str, place: str) -> LedgerRow:
    try:
        values = json.loads(line)
        return LedgerRow(**{name: value for name, value in values.items() if name in _NAMES})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{place}: this is no row of a compression ledger: {error}") from error
