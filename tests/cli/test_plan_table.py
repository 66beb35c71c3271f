"""The planner's answer, as it is printed."""

from __future__ import annotations

import io
from dataclasses import replace

from planned_run import CPU, Case
from rich.console import Console

from lightllm.cli.plan_table import print_plan
from lightllm.parallel.plan import Planner


def test_what_fits_comes_first_and_what_does_not_says_by_how_much() -> None:
    case = Case("one", rows=1, length=32)
    enough = Planner(case.job(), CPU).rank(256)
    peaks = sorted(one.memory.peak for one in enough)
    machine = replace(CPU, memory=sum(peaks[:2]) / 2 / 2**30)
    planner = Planner(case.job(), machine)
    text = io.StringIO()
    estimates = planner.rank(256)
    print_plan(planner, estimates, 256, 12, Console(file=text, width=250))
    said = text.getvalue()
    assert f"{len(enough)} ways to spread 256 tokens a step" in said
    assert ": 1 fit" in said
    assert said.index("computes nearly all the time") < said.index("does not fit") if "computes" in said else True
    assert estimates[0].memory.peak == peaks[0]
