from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from lightllm.compression.ledger import LedgerRow
from lightllm.compression.ledger_table import cells, markdown, table

DENSE = LedgerRow(
    step="dense",
    training_step=0,
    parameters=134_515_008,
    nonzero_parameters=134_515_008,
    weight_bytes=269_030_016,
    loss=2.9291,
    target_tokens=4000,
    tokens_per_second=21.26,
    peak_memory=310_000_000,
    device="cpu",
)
SMALL = replace(
    DENSE,
    step="export.gguf",
    training_step=None,
    nonzero_parameters=81_000_000,
    weight_bytes=76_212_345,
    loss=3.0291,
    tokens_per_second=None,
)


def test_cells_have_units_and_comparisons() -> None:
    values = [tuple(one) for one in cells(SMALL, DENSE)]
    assert values == [
        ("export.gguf", ""),
        ("", ""),
        ("134.5M", "x1"),
        ("60.2%", ""),
        ("76.2", "x0.283"),
        ("4.53", ""),
        ("3.0291", "+0.1000"),
        ("", ""),
        ("310.0", "x1"),
    ]
    assert [one.comparison for one in cells(DENSE, DENSE)] == [""] * 9
    assert [one.comparison for one in cells(SMALL, None)] == [""] * 9
    assert cells(replace(DENSE, step="WandaPruning"), None)[0].value == "Wanda Pruning"
    assert cells(replace(DENSE, parameters=999, weight_bytes=2500), None)[2].value == "999"
    assert cells(replace(DENSE, weight_bytes=2500), None)[4].value == "0.0025"


def printed(rows: list[LedgerRow], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table(rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_a_terminal() -> None:
    lines = printed([DENSE, replace(SMALL, step="[bold]")], 80).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "[bold]" in text
    assert "x0.283" in text
    assert "+0.1000" in text


def test_markdown_is_a_table() -> None:
    lines = markdown([DENSE, replace(SMALL, step="a|b")]).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith(r"| a\|b |  | 134.5M (x1) | 60.2% | 76.2 (x0.283) |")
    assert {line.replace(r"\|", "").count("|") for line in lines} == {10}
