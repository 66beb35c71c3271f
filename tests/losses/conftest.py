from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Work:
    """What a piece of code did: every allocation of the CPU allocator, inside operators too, and its products."""

    allocations: list[int] = field(default_factory=list)
    """Bytes, negative where memory was given back."""
    num_products: int = 0

    @property
    def largest(self) -> int:
        return max(self.allocations)


@contextmanager
def _recorded() -> Iterator[Work]:
    work = Work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield work
    events = profiler.profiler.kineto_results.events()
    work.allocations = [event.nbytes() for event in events if event.name() == "[memory]"]
    work.num_products = sum(event.name() in {"aten::mm", "aten::addmm"} for event in events)
    assert work.allocations, "the profiler saw no allocation"


@pytest.fixture
def recorded() -> Callable[[], Iterator[Work]]:
    """Return the context manager that records what runs inside it."""
    return _recorded


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
