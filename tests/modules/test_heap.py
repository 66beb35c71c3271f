"""The heap keeps what is freed where the C library can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lightllm.modules.heap import keep_freed_memory

FAULTS = """
import ctypes, resource, sys
import torch
from lightllm.modules.heap import keep_freed_memory
torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault for five hundred
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return torch.ones(2**24)  # 64 MiB: from 32 on, glibc never keeps a block by itself
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_steps_that_allocate_the_same_again_fault_no_more_pages() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True).stdout)
        for how in ("keep", "default")
    }
    # How many pages a fault brings is up to the kernel and what memory it has free, so the numbers say nothing alone.
    assert faults["keep"] * 10 < faults["default"]


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
