"""This machine, measured."""

from __future__ import annotations

import torch

from lightllm.parallel.machine_here import device_memory, machine_here


def test_it_is_measured_as_something_plausible_and_threads_stay_as_they_were() -> None:
    threads = torch.get_num_threads()
    found = machine_here()
    assert torch.get_num_threads() == threads
    assert found.devices >= 1
    assert 1e-4 < found.rate("float32") / 1e12 < 1e3
    assert 0.1 < found.memory_bandwidth < 1e5
    assert 0.01 < found.link < 1e4
    if found.kind == "cpu":
        assert 0.1 < found.start < 1000
        assert found.memory * found.devices * 2**30 <= device_memory() * 1.001
