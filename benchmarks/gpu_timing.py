"""Timing on a GPU: clocks, buffers that no cache holds, and the limits of the memory.

On the CPU (tests/gpu_device.py says when) everything runs on tiny inputs, to try a benchmark.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import results
import torch
from comparison import Clock, Function
from gpu_device import DEVICE
from torch import Tensor

HEAD_START = 4_000_000
"""Cycles, some 2 ms, that the device sleeps while the host queues what is to be timed."""
LONGEST_HEAD_START = 8 * HEAD_START
LIMIT_BYTES = 4 * 2**30
MOST_MEMORY = 60e9
"""Bytes the process may take, of the 80 GB that such GPUs have."""
SHRINK = 1000
"""How much smaller inputs are on the CPU."""


def device_clock(function: Function) -> float:
    """Milliseconds on the device alone: the host is done queueing before the clock starts.

    A function that waits for the device cannot be queued ahead; its time then holds the host's
    too, which is what it costs.
    """
    cycles = HEAD_START
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        function()
        host_was_late = start.query()
        end.record()
        end.synchronize()
        if not host_was_late or cycles >= LONGEST_HEAD_START:
            return start.elapsed_time(end)
        cycles *= 2


def clock_of_both(function: Function) -> float:
    """Milliseconds from the call, on an idle device, until the device is done."""
    _synchronize()
    begin = time.perf_counter()
    function()
    _synchronize()
    return (time.perf_counter() - begin) * 1e3


def host_clock(function: Function) -> float:
    """Milliseconds until the call returns, on an idle device."""
    _synchronize()
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turn(functions: Sequence[Function]) -> Function:
    """One function that calls the next of several each time."""
    following = itertools.cycle(functions)
    return lambda: next(following)()


def sweeps(bytes_each: int, cache_bytes: int) -> int:
    """How many buffers to go through, so that three caches' worth lies between two uses of one."""
    return max(2, math.ceil(3 * cache_bytes / bytes_each) + 1)


class Gpu:
    """The device of the benchmarks."""

    device = DEVICE
    clocks: dict[str, Clock] = {  # noqa: RUF012
        "device": device_clock if DEVICE == "cuda" else host_clock,
        "both": clock_of_both,
        "host": host_clock,
    }

    def __init__(self) -> None:
        if DEVICE == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, MOST_MEMORY / total))

    def size(self, number: int) -> int:
        """A number of rows or elements; fewer on the CPU."""
        return number if DEVICE == "cuda" else max(2, number // SHRINK)

    def rounds(self, number: int) -> int:
        return number if DEVICE == "cuda" else 3

    def buffers(self, make: Callable[[], Tensor]) -> list[Tensor]:
        """As many tensors of one kind as it takes to find none of them in the cache."""
        first = make()
        if DEVICE != "cuda":
            return [first, make()]
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return [first, *(make() for _ in range(sweeps(first.nbytes, cache) - 1))]

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """GB/s of a large copy, read and written, and of the fastest of torch's reductions."""
        source, target = (
            torch.ones(self.size(LIMIT_BYTES // 4), device=self.device) for _ in range(2)
        )
        copy = self._median(lambda: target.copy_(source))
        reductions = (torch.sum, torch.amax, torch.linalg.vector_norm)
        read = min(self._median(functools.partial(f, source)) for f in reductions)
        self.free()
        return {"copy": 2 * source.nbytes / copy / 1e6, "read": source.nbytes / read / 1e6}

    def _median(self, function: Function) -> float:
        function()
        clock = self.clocks["device"]
        return statistics.median(clock(function) for _ in range(self.rounds(21)))

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        """What a results file says of it."""
        from pyvizllm import info

        machine = results.gpu_machine() or {"gpu": "no GPU: a trial on the CPU", "driver": "none"}
        limits = {f"{name}_gb_per_s": value for name, value in self.limits.items()}
        return {"torch": torch.__version__, **machine, "pyvizllm": info.version(), **limits}

    def free(self) -> None:
        """Give back the memory of a case, and the graphs that were compiled for it."""
        torch._dynamo.reset()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
