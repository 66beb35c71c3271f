"""This machine, as a plan sees it: its GPUs, or its processor's cores as devices of a thread each, measured."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from lightllm.flops import measured_peak, peak_flops
from lightllm.parallel.machine import GIB, KNOWN, Machine

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MEGABYTES = 16
"""Size of what is copied and exchanged to see how fast that is: beyond a processor's caches."""


def machine_here() -> Machine:
    """Measure this machine; a second or two."""
    return _gpus() if torch.cuda.is_available() else _cores()


def device_memory(kind: Literal["cpu", "cuda"]) -> float:
    """Bytes that a device of this machine has: a GPU's memory, or all of the processor's."""
    if kind == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    if sys.platform == "win32":
        return float("inf")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _gpus() -> Machine:
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    name = properties.name
    known = next((one for label, one in KNOWN.items() if label.upper() in name.upper().replace(" ", "")), Machine())
    return Machine(
        devices=torch.cuda.device_count(),
        memory=properties.total_memory / GIB,
        teraflops={label: peak_flops(device, dtype) / 1e12 for label, dtype in _TYPES.items()},
        memory_bandwidth=known.memory_bandwidth,
        link=known.link,
        network=known.network,
        name=name,
    )


def _cores() -> Machine:
    """A device is a process of one thread, with its share of the memory."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu = torch.device("cpu")
        cache, cache_bandwidth, memory_bandwidth = _caches()
        link, latency = _link() if cores > 1 and sys.platform == "linux" else (10.0, 100.0)
        return Machine(
            devices=cores,
            memory=device_memory("cpu") / cores / GIB,
            teraflops={name: measured_peak(cpu, dtype) / 1e12 for name, dtype in _TYPES.items()},
            memory_bandwidth=memory_bandwidth,
            cache=cache,
            cache_bandwidth=cache_bandwidth,
            link=link,
            network=link,
            link_latency=latency,
            network_latency=latency,
            start=_start(),
            efficiency=0.9,
            reach=1.0,
            reserve=0.1,
            kind="cpu",
            name="cores",
        )
    finally:
        torch.set_num_threads(threads)


def _best(function: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best


def _copies(megabytes: float) -> float:
    """GB/s of an operation that reads and writes so many MB, by a sum of two tensors into a third."""
    one, two, out = (torch.zeros(int(megabytes * 1e6 / 12)) for _ in range(3))

    def add() -> None:
        for _ in range(max(1, int(64 / megabytes))):
            torch.add(one, two, out=out)

    return max(1, int(64 / megabytes)) * 3 * 4 * one.numel() / _best(add) / 1e9


def _caches() -> tuple[float, float, float]:
    """MB that an operation may move within caches, GB/s there, and GB/s of the memory."""
    slow, fast = _copies(8 * _MEGABYTES), _copies(0.25)
    size = 0.25
    while size < 8 * _MEGABYTES and _copies(2 * size) > (slow * fast) ** 0.5:
        size *= 2
    return size, max(fast, slow), slow


def _start() -> float:
    """Microseconds of an operation on nearly nothing, as training makes it: with a graph for its backward pass."""
    one = torch.zeros(8, requires_grad=True)

    def operations() -> None:
        for _ in range(100):
            one * 2.0

    return _best(operations) / 100 * 1e6 * 2  # and the backward pass's own


def _link() -> tuple[float, float]:
    """GB/s and microseconds of a message from one process to another, by gloo's sum over two."""
    context = get_context("fork")
    with TemporaryDirectory(prefix="lightllm-link-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        receive, send = context.Pipe(duplex=False)
        store = str(Path(folder) / "store")
        processes = [context.Process(target=_exchange, args=(store, rank, send)) for rank in range(2)]
        for process in processes:
            process.start()
        answered = receive.poll(60)
        large, small = receive.recv() if answered else (1.0, 1e-4)
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    # A sum of two goes once in each direction, half of it at a time.
    return _MEGABYTES * 2**20 / large / 1e9, small * 1e6 / 2


def _exchange(store: str, rank: int, send: Connection) -> None:
    """Be one of two processes."""
    import torch.distributed as dist

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    large, small = torch.zeros(_MEGABYTES * 2**18), torch.zeros(1)
    seconds = [_best(lambda one=one: dist.all_reduce(one)) for one in (large, small)]  # type: ignore[misc]
    if rank == 0:
        send.send(tuple(seconds))
    dist.destroy_process_group()
