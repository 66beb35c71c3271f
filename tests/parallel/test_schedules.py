from __future__ import annotations

from typing import Any

import pytest

from lightllm.parallel.schedules import make_plan


def test_who_has_which_stage() -> None:
    assert [make_plan("1f1b", 3, 3, None).stages_of(rank) for rank in range(3)] == [[0], [1], [2]]
    assert [make_plan("interleaved_1f1b", 2, 4, 3).stages_of(rank) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [make_plan("zbv", 3, 6, None).stages_of(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert make_plan("zero_bubble", 4, 8, None).num_stages == 8


def test_idling_by_the_formula() -> None:
    assert make_plan("1f1b", 4, 12, None).bubble() == pytest.approx(3 / 15)
    assert make_plan("gpipe", 2, 2, None).bubble() == pytest.approx(1 / 3)
    assert make_plan("interleaved_1f1b", 4, 12, 2).bubble() == pytest.approx(3 / 27)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 4, None), "no schedule '2f2b': there are gpipe, 1f1b"),
        (("1f1b", 1, 4, None), "pipeline is 1: a pipeline has at least 2"),
        (("1f1b", 4, 3, None), "microbatches is 3, and 4 ranks would never all be at work: give at least 4"),
        (("1f1b", 2, 4, 2), "stages_per_rank is 2, and 1f1b has 1"),
        (("interleaved_1f1b", 2, 4, 1), "stages_per_rank is 1, and interleaved_1f1b needs at least 2"),
        (("zbv", 2, 4, 3), "zbv has 2"),
        (("zero_bubble", 2, 5, None), "cannot divide into 2 equal rounds for 2 ranks: give 4 or 6"),
    ],
)
def test_what_no_schedule_can_do_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(*arguments)


def test_which_schedules_cut_the_backward_pass_in_two() -> None:
    names = ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv"]
    assert [name for name in names if make_plan(name, 2, 4, None).splits_backward] == [  # type: ignore[arg-type]
        "zero_bubble",
        "zbv",
    ]
