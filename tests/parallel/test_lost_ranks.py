from __future__ import annotations

import pytest
import torch
from ranks import kill_rank, run_on_ranks

from lightllm.parallel.lost_ranks import LostRankError, is_loss, noticing_lost_ranks


def wait_for_the_dead() -> str:
    if torch.distributed.get_rank() == 1:
        kill_rank()
    try:
        with noticing_lost_ranks():
            torch.distributed.recv(torch.zeros(1), src=1)
    except LostRankError as error:
        raise ValueError(f"it said: {error}") from None
    return "nothing was noticed"


def test_a_rank_that_is_killed_is_called_so() -> None:
    with pytest.raises(AssertionError, match=r"said: rank 0 stops, because another rank of the run has died.*--resume"):
        run_on_ranks(wait_for_the_dead, 2)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes") as raised, noticing_lost_ranks():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(raised.value, LostRankError)
    outer = RuntimeError("stage 1 failed")
    outer.__cause__ = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    assert is_loss(outer)
    assert not is_loss(RuntimeError("no"))
