from __future__ import annotations

from typing import Any

import pytest

from lightllm.compression.sparsity_schedule import SparsitySchedule, step_of


def test_one_shot() -> None:
    schedule = SparsitySchedule("one_shot", 0.5, begin=3, end=7)
    assert [schedule.at(step) for step in range(6)] == [0, 0, 0, 0.5, 0.5, 0.5]
    assert [step for step in range(10) if schedule.prunes_at(step)] == [3]
    assert schedule.last == 3


def test_cubic_is_the_papers_formula() -> None:
    schedule = SparsitySchedule("cubic", 0.8, begin=10, end=110, every=20)
    assert [step for step in range(200) if schedule.prunes_at(step)] == [10, 30, 50, 70, 90, 110]
    for pruning in range(6):
        step = 10 + 20 * pruning
        # s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 with s_i = 0, n = 5, dt = 20
        expected = 0.8 + (0 - 0.8) * (1 - (step - 10) / (5 * 20)) ** 3
        assert schedule.at(step) == pytest.approx(expected)
        assert schedule.at(step + 19) == schedule.at(step), "the mask stays until the next pruning"
    assert (schedule.at(9), schedule.at(10), schedule.at(110), schedule.at(10_000)) == (0, 0, 0.8, 0.8)
    assert schedule.last == 110


def test_cubic_ends_at_the_end_and_never_falls() -> None:
    schedule = SparsitySchedule("cubic", 0.5, begin=0, end=10, every=4)
    assert [step for step in range(20) if schedule.prunes_at(step)] == [0, 4, 8, 10]
    sparsities = [schedule.at(step) for step in range(12)]
    assert sparsities == sorted(sparsities)
    assert sparsities[-2:] == [0.5, 0.5]


def test_a_moment_is_a_step_or_a_share() -> None:
    assert [step_of(moment, 50, "begin") for moment in (0, 7, 50, 0.0, 0.5, 1.0, 0.333)] == [0, 7, 50, 0, 25, 50, 17]
    assert step_of(7, None, "begin") == 7
    assert step_of(0.0, None, "begin") == 0, "the start is known of any run"


@pytest.mark.parametrize(
    ("moment", "num_steps", "message"),
    [
        (51, 50, "end is step 51, and the run has steps 0 to 50"),
        (-1, 50, "end is step -1"),
        (1.5, 50, "end is 1.5, which is no share"),
        (-0.1, 50, "end is -0.1, which is no share"),
        (0.5, None, r"trainer\.max_steps"),
    ],
)
def test_moments_refused(moment: float, num_steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_of(moment, num_steps, "end")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.2}, "not a share of the weights"),
        ({"every": 0}, "every 0 steps"),
        ({"end": 5}, "end it later"),
    ],
)
def test_schedules_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsitySchedule(**{"shape": "cubic", "sparsity": 0.5, "begin": 5, "end": 10, **fields})
