"""The ground that tests with several processes stand on."""

from __future__ import annotations

import time

import pytest
import torch
from ranks import kill_rank, run_on_ranks


def place_and_sum(start: int) -> tuple[int, int, float]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total = torch.tensor(float(start + rank))
    torch.distributed.all_reduce(total)
    return rank, size, total.item()


def fail_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("the second rank does not like it")
    torch.distributed.barrier()


def kill_one() -> None:
    if torch.distributed.get_rank() == 1:
        kill_rank()
    torch.distributed.barrier()


def hang() -> None:
    time.sleep(60)


def test_every_rank_answers() -> None:
    assert run_on_ranks(place_and_sum, 2, 5) == [(0, 2, 11.0), (1, 2, 11.0)]


def test_a_failure_is_told_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="the second rank does not like it"):
        run_on_ranks(fail_on_one, 2)
    with pytest.raises(AssertionError, match="rank 1 ended with -9"):
        run_on_ranks(kill_one, 2)


def test_ranks_that_hang_are_killed() -> None:
    with pytest.raises(AssertionError, match="not done after 1 s"):
        run_on_ranks(hang, 1, seconds=1.0)
