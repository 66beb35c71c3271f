"""The compression ledger to be read: a table for the terminal and for Markdown."""

from __future__ import annotations

import re
from typing import NamedTuple

from rich import box
from rich.table import Table

from lightllm.compression.ledger import LedgerRow, ratios, reference

COLUMNS = ("step", "at", "weights", "non-zero", "MB", "bits", "loss", "tokens/s", "peak MB")
"""`at` is the training step; MB those of the weights, bits those of one; the peak is that of generation."""


class Cell(NamedTuple):
    """A value, and how it compares with the dense network's."""

    value: str
    comparison: str = ""


def cells(row: LedgerRow, dense: LedgerRow | None) -> list[Cell]:
    """A row's cells, one for each of `COLUMNS`; there is no comparison of the dense row with itself."""
    compared = {} if dense is None or row is dense else ratios(row, dense)

    def ratio(name: str) -> str:
        value = compared.get(f"{name}_ratio")
        return "" if value is None else f"x{value:.3g}"

    increase = compared.get("loss_increase")
    return [
        Cell(re.sub("(?<=[a-z])(?=[A-Z])", " ", row.step)),  # the words of a class's name, where a line may break
        Cell("" if row.training_step is None else str(row.training_step)),
        Cell(_counted(row.parameters), ratio("parameters")),
        Cell(f"{row.nonzero_parameters / row.parameters:.1%}"),
        Cell(_megabytes(row.weight_bytes), ratio("weight_bytes")),
        Cell(f"{row.bits_per_weight:.3g}"),
        Cell("" if row.loss is None else f"{row.loss:.4f}", "" if increase is None else f"{increase:+.4f}"),
        Cell("" if row.tokens_per_second is None else f"{row.tokens_per_second:.3g}", ratio("tokens_per_second")),
        Cell("" if row.peak_memory is None else _megabytes(row.peak_memory), ratio("peak_memory")),
    ]


def table(rows: list[LedgerRow]) -> Table:
    """The ledger for the terminal, comparisons with the dense network below the values."""
    made = Table(title="What compression cost", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(COLUMNS):
        made.add_column(name, justify="right" if index else "left", overflow="fold")
    dense = reference(rows)
    for row in rows:
        found = cells(row, dense)
        below = "\n" if any(one.comparison for one in found) else ""
        made.add_row(*(f"{_plain(one.value)}{below}[dim]{one.comparison}[/]" for one in found))
    return made


def markdown(rows: list[LedgerRow]) -> str:
    """The ledger as a table in Markdown, comparisons with the dense network in parentheses."""
    dense = reference(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for row in rows:
        texts = [f"{one.value} ({one.comparison})" if one.comparison else one.value for one in cells(row, dense)]
        lines.append("| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |")
    return "\n".join(lines) + "\n"


def _counted(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}" if num_bytes >= 1e6 else f"{num_bytes / 1e6:.3g}"


def _plain(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")
