"""What telemetry costs the training: measured, published, and held within a budget."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

OVERHEAD_TAG = "pyvizllm/overhead_pct"
EVERY_TAG = "pyvizllm/publish_every"
MEASURE_TAG = "pyvizllm/measure_every"
_WIDEST = 2**20
_logger = logging.getLogger("pyvizllm")


@dataclass
class Cost:
    """Of the steps between two publications, in seconds."""

    wall: float  # without pauses
    steps: float  # what measuring and logging took of the training thread
    publications: float  # what handing over took of it
    events: list[tuple[torch.Event, torch.Event]]  # around the measuring, on a GPU

    def on_device(self) -> float:
        """Waits for the events; on the publisher's thread."""
        for _, end in self.events:
            end.synchronize()  # sync point
        return sum(begin.elapsed_time(end) for begin, end in self.events) / 1000


class Overhead:
    """Clocks around telemetry's own code, and the intervals that follow from them.

    On a CPU the publisher's thread takes its time from the training, so its CPU time counts; on a
    GPU the time between events around the measuring counts where it is longer than the host's.
    What an optimizer of ours collects in its own pass is part of its step and in no figure.

    Arguments:
        every: optimizer steps between two publications, to begin with.
        budget: share of the wall clock that telemetry may take, such as 0.01; None for any.
        device: that of the training.
    """

    def __init__(self, every: int, budget: float | None, device: torch.device) -> None:
        self.every, self.measure_every = every, 1  # written by the publisher's thread alone
        self._budget, self.device = budget, device
        self._on_host = device.type == "cpu"
        self._begin, self._paused = time.perf_counter(), 0.0
        self._pause_began: float | None = None  # while there is one
        self._steps = self._publications = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []
        self.within = False  # a step's code, which a publication may be part of
        self._cpu = 0.0  # of the publisher's thread, at the last publication
        self._intervals = 0

    @contextlib.contextmanager
    def of_step(self, *, device: bool = False) -> Iterator[None]:
        """Count the time within; with `device`, what the GPU does within too."""
        start = time.perf_counter()
        begin = self._record() if device and not self._on_host else None
        self.within = True
        try:
            yield
        finally:
            self.within = False
            if begin is not None:
                self._events.append((begin, self._record()))
            if self._pause_began is None:
                self._steps += time.perf_counter() - start

    @contextlib.contextmanager
    def of_publication(self) -> Iterator[None]:
        """Count the time within as that of a publication."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            if self._pause_began is None:
                self._publications += elapsed
                if self.within:
                    self._steps -= elapsed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within out of the wall clock, once if pauses are nested."""
        if self._pause_began is not None:
            yield
            return
        self._pause_began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - self._pause_began
            self._pause_began = None

    def take(self) -> Cost:
        """The cost since the last take, on the training thread."""
        now = time.perf_counter()
        if self._pause_began is not None:  # the rest of it is of the next interval
            self._paused += now - self._pause_began
            self._pause_began = now
        wall = now - self._begin - self._paused
        cost = Cost(wall, self._steps, self._publications, self._events)
        self._begin, self._paused = now, 0.0
        self._steps = self._publications = 0.0
        self._events = []
        return cost

    def scalars(self, cost: Cost) -> dict[str, float]:
        """What is shown of `cost`; adapts the intervals to the budget. Publisher's thread only."""
        cpu = time.thread_time()
        publications = cost.publications + (cpu - self._cpu if self._on_host else 0.0)
        self._cpu = cpu
        steps = max(cost.steps, cost.on_device())
        self._intervals += 1
        shown = {}
        if cost.wall > 0:  # else all of it was a pause
            shown[OVERHEAD_TAG] = 100 * (steps + publications) / cost.wall
            # The first interval is no measure: memory is got and code compiled in it.
            if self._budget is not None and self._intervals > 1:
                self._fit(self._budget, steps / cost.wall, (steps + publications) / cost.wall)
        return {
            **shown,
            EVERY_TAG: float(self.every),
            MEASURE_TAG: float(self.measure_every),
        }

    def keep_intervals(self) -> None:
        """Of several processes that show wholes together none may publish less often by itself."""
        if self._budget is not None:
            self._budget = None
            _logger.warning("watch: max_overhead has no effect where parameters are sharded")

    def _fit(self, budget: float, steps: float, total: float) -> None:
        if steps > budget:
            self.measure_every = min(2 * self.measure_every, _WIDEST)
            self.every = max(self.every, self.measure_every)  # what is published is measured
        elif total > budget:
            self.every = min(2 * self.every, _WIDEST)

    def _record(self) -> torch.Event:
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event
