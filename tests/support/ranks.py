"""Several ranks of one job as forks of the test process, which has imported everything already.

A Trainer made on a rank finds the job as it would under torchrun: give it `devices=world_size` and a strategy.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

T = TypeVar("T")

GRACE = 10.0
"""Seconds that the others get to say what became of them, once one rank has failed."""


def run_on_ranks(function: Callable[..., T], world_size: int, *arguments: Any, seconds: float = 60.0) -> list[T]:
    """Call a function on so many ranks at once; what it returned on each.

    Args:
        function: Called with the arguments on every rank, within an initialised gloo process group. What it returns
            is pickled: make whole tensors of distributed ones.
        world_size: How many ranks.
        arguments: Of the function. They are not pickled, and may be anything.
        seconds: After which every rank is killed, and the test fails.

    Raises:
        AssertionError: A rank failed, or the time is over; with the traceback of every rank that has one.
    """
    with TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        context = get_context("fork")
        processes: list[BaseProcess] = [
            context.Process(target=_be_rank, args=(folder, function, rank, world_size, arguments, seconds))
            for rank in range(world_size)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
            for process in processes:
                process.start()
        late = _wait(processes, seconds)
        _refuse_failures(folder, processes, f"not done after {seconds:.0f} s" if late else "")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def kill_rank() -> None:
    """End this process as `kill -9` would, in the middle of what it is doing."""
    os.kill(os.getpid(), 9)


def _wait(processes: list[BaseProcess], seconds: float) -> bool:
    """Wait until all ranks have ended, or end them: whether the time was over."""
    end = time.monotonic() + seconds
    failed = False
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if not failed and any(process.exitcode for process in processes):
            failed, end = True, min(end, time.monotonic() + GRACE)
        time.sleep(0.005)
    late = any(process.is_alive() for process in processes)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return late


def _refuse_failures(folder: Path, processes: list[BaseProcess], what: str) -> None:
    if not what and not any(process.exitcode for process in processes):
        return
    told = [what] if what else []
    for rank, process in enumerate(processes):
        file = folder / f"{rank}.traceback"
        told.append(f"rank {rank} ended with {process.exitcode}" + (f":\n{file.read_text()}" if file.exists() else ""))
    raise AssertionError("\n".join(told))


def _be_rank(
    folder: Path, function: Callable[..., Any], rank: int, world_size: int, arguments: tuple[Any, ...], seconds: float
) -> None:
    """Be one rank: what torchrun sets in the environment, a process group over a file, and the function."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not lead anywhere
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a command before, to which strategies of several ranks would go back
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        torch.save(function(*arguments), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()
    except BaseException as error:
        (folder / f"{rank}.traceback").write_text(traceback.format_exc())
        raise SystemExit(1) from error  # which prints nothing: the test process tells it
