"""The planner's answer, to be read."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightllm.parallel.machine import GIB
from lightllm.parallel.plan import Estimate, Planner, reason

PARTS = ("weights", "optimizer", "gradients", "activations", "loss", "working")
"""What memory is made of, as `MemoryEstimate` names it."""

_WIDE = 140
"""Characters in a line from which every part has a column of its own."""


def print_plan(
    planner: Planner, estimates: list[Estimate], tokens: int, top: int, console: Console | None = None
) -> None:
    """Print the best ways to spread a job, and then the nearest of those that do not fit."""
    console = console or Console()
    fitting = [one for one in estimates if one.fits]
    others = [one for one in estimates if not one.fits]
    console.print(
        f"{len(estimates)} ways to spread {tokens:,} tokens a step over {planner.machine.describe()}: "
        f"{len(fitting)} fit"
    )
    shown = fitting[:top]
    shown += others[: max(top - len(shown), 3)]
    console.print(plan_table(planner, shown, console.width >= _WIDE))
    best = estimates[0]
    parts = ", ".join(f"{name} {_gib(getattr(best.memory, name))}" for name in PARTS)
    console.print(f"The first, in GiB of its fullest device at the worst moment: {parts}")


def plan_table(planner: Planner, estimates: list[Estimate], every_part: bool) -> Table:
    """Rows of estimates, with what decides about each.

    Args:
        planner: Of which machine.
        estimates: What is shown.
        every_part: Whether weights, gradients, … have columns beside their sum.
    """
    table = Table()
    table.add_column("spread")
    table.add_column("rows", no_wrap=True)
    for name in ("GiB", *(PARTS if every_part else ()), "s/step", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    for one in estimates:
        parts = [_gib(getattr(one.memory, name)) for name in PARTS] if every_part else []
        table.add_row(
            one.layout.describe() + (", recomputed" if one.layout.recompute else ""),
            f"{one.layout.rows} x {one.layout.microbatches}",
            _gib(one.memory.peak),
            *parts,
            f"{one.time.seconds:.3g}",
            f"{one.tokens_per_second:,.0f}",
            reason(one, planner.machine),
            style=None if one.fits else "dim",
        )
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"
