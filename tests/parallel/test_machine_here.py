"""This machine, measured."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
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
        assert found.memory * found.devices * 2**30 <= device_memory("cpu") * 1.001


@pytest.mark.skipif(sys.platform == "win32", reason="needs sysconf")
def test_the_memory_of_the_processor_is_not_that_of_a_gpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1))
    assert device_memory("cpu") == total
    assert device_memory("cuda") == 1
