from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from lightllm.modules import Schedule


def rates(schedule: Any, steps: int, total: int | None) -> list[float]:
    """The learning rate of every optimizer step, as a share, and that after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = schedule(optimizer) if total is None else schedule.scheduler(optimizer, total)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 0.5)
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"] / 0.5]


def expected(shape: str, step: int, warmup: int, decay: int, floor: float, total: int) -> float:
    if step < warmup:
        return step / warmup
    begin = {"constant": math.inf, "warmup-stable-decay": total - decay}.get(shape, warmup)
    if step <= begin:
        return 1.0
    part = min((step - begin) / (total - begin), 1.0)
    return floor + (1 - floor) * ((1 + math.cos(math.pi * part)) / 2 if shape == "cosine" else 1 - part)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "warmup-stable-decay"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 0), (4, 4), (0.25, 5), (1, 1)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_rates_are_those_of_the_formula(shape: Any, warmup: float, steps: int, floor: float) -> None:
    total = 20
    found = rates(Schedule(shape, warmup, 0.3, floor), total + 3, total)
    assert found == pytest.approx([expected(shape, step, steps, 6, floor, total) for step in range(total + 4)])
    assert found[steps] == 1.0
    assert found[total] == pytest.approx(1.0 if shape == "constant" else floor)


def test_rates_are_those_of_transformers() -> None:
    for ours, theirs in [
        (Schedule("cosine", 3), lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 3, 20)),
        (Schedule("linear", 3), lambda optimizer: get_linear_schedule_with_warmup(optimizer, 3, 20)),
        (
            Schedule("warmup-stable-decay", 3, 5),
            lambda optimizer: get_wsd_schedule(optimizer, 3, 5, 20, decay_type="linear"),
        ),
    ]:
        assert rates(ours, 20, 20) == pytest.approx(rates(theirs, 20, None))


def test_a_decay_is_given_in_steps_or_as_a_share() -> None:
    assert rates(Schedule("warmup-stable-decay", 0, 5), 20, 20) == rates(
        Schedule("warmup-stable-decay", 0, 0.25), 20, 20
    )
    assert rates(Schedule("warmup-stable-decay", 0, 0), 20, 20) == [1.0] * 21


def test_a_run_without_an_end_has_a_constant_rate_only() -> None:
    assert rates(lambda optimizer: Schedule("constant", 4).scheduler(optimizer, None), 6, None) == [
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    for schedule in (Schedule(), Schedule("linear"), Schedule("warmup-stable-decay"), Schedule("constant", 0.1)):
        with pytest.raises(
            ValueError, match=rf"a {schedule.shape} schedule needs to know when the run ends: set train"
        ):
            schedule.scheduler(optimizer, None)


def test_a_run_that_is_too_short_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    for schedule, message in [
        (Schedule("cosine", 10), r"warm-up of 10 steps.* do not fit into a run of 10 steps: shorten them"),
        (Schedule("constant", 11), r"warm-up of 11 steps do not fit into a run of 10 steps"),
        (Schedule("warmup-stable-decay", 5, 6), r"warm-up of 5 steps and decay of 6 do not fit into a run of 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            schedule.scheduler(optimizer, 10)
    Schedule("warmup-stable-decay", 5, 5).scheduler(optimizer, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": -1}, "warmup is a number of steps or a share of the run below 1, not -1"),
        ({"warmup": 2.5}, "warmup is a number of steps or a share of the run below 1, not 2.5"),
        ({"decay": -0.1}, "decay is a number of steps"),
        ({"floor": 1.5}, "floor is a share of the learning rate, between 0 and 1, not 1.5"),
        ({"floor": -0.5}, "floor is a share"),
    ],
)
def test_lengths_and_shares_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_its_place_is_saved() -> None:
    def make() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, Schedule("cosine", 3).scheduler(optimizer, 20)

    optimizer, scheduler = make()
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    other_optimizer, other = make()
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    for one in (optimizer, other_optimizer):
        one.step()
    scheduler.step()
    other.step()
    assert other.get_last_lr() == scheduler.get_last_lr()
