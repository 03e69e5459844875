"""What a step allocates at most, as torch's own allocator says."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that was allocated on the CPU at one time, above what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    total = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak
