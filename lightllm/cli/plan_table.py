"""The planner's answer, to be read."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightllm.parallel.machine import GIB
from lightllm.parallel.plan import Estimate, Planner, reason


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
    console.print(plan_table(planner, shown))


def plan_table(planner: Planner, estimates: list[Estimate]) -> Table:
    """Rows of estimates, with what decides about each."""
    table = Table(title="Plan", title_justify="left")
    for name in ("spread", "batch", "recompute"):
        table.add_column(name)
    for name in ("GiB", "weights", "optimizer", "gradients", "activations", "loss", "other", "s/step", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for one in estimates:
        memory = one.memory
        parts = (
            memory.peak,
            memory.weights,
            memory.optimizer,
            memory.gradients,
            memory.activations,
            memory.loss,
            memory.working,
        )
        table.add_row(
            one.layout.describe(),
            f"{one.layout.rows} x {one.layout.microbatches}",
            "blocks" if one.layout.recompute else "",
            *(f"{part / GIB:.3g}" for part in parts),
            f"{one.time.seconds:.3g}",
            f"{one.tokens_per_second:,.0f}",
            reason(one, planner.machine),
            style=None if one.fits else "dim",
        )
    return table
