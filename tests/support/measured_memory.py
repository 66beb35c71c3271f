"""The peak of what torch allocates on a CPU, as its own profiler counts it: every allocation, kernels' scratch too."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_allocated(function: Callable[[], object]) -> int:
    """The most bytes at once that `function` had allocated, beyond those that were there before."""
    gc.collect()  # what others left in cycles is not to be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak
