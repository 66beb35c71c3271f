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
    assert said.count("does not fit: ") == min(len(enough) - 1, 11)
    assert "The first, in GiB of its fullest device at the worst moment: weights" in said
    assert "activations" in said.splitlines()[2], "a wide terminal has a column for each part"
    assert estimates[0].memory.peak == peaks[0]


def test_a_narrow_terminal_has_the_sum_alone() -> None:
    planner = Planner(Case("one", rows=1, length=32).job(), CPU)
    text = io.StringIO()
    print_plan(planner, planner.rank(32), 32, 12, Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "activations" not in lines[2]
    assert any("one device" in line and "1 x 1" in line for line in lines)
