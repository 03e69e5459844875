"""Histogram counts that the training thread adds to and the publisher's thread reads.

A publication takes the counts of its interval away without a copy on the training thread. Where
the last ones have not been read yet, there is nothing to put in their place: the interval then
simply goes on and the next publication shows the steps of both.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyvizllm.ops import BINS
from pyvizllm.telemetry.host_copies import copy_stream
from pyvizllm.telemetry.records import Counts


class TakenCounts:
    """The counts of an interval, [T, 4096] int64; they go back to their pool with their last view.

    NumPy keeps an object that an array was made from alive as long as any view of the array.
    """

    def __init__(self, counts: Tensor, event: torch.Event | None, used: deque[Tensor]) -> None:
        self._counts, self._event, self._used = counts, event, used

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._counts.numpy().__array_interface__

    def read(self) -> Counts:
        """Wait until the counts are on the host; never called on the training thread."""
        if self._event is not None:
            self._event.synchronize()  # sync point
        return np.asarray(self)

    def __del__(self) -> None:
        self._used.append(self._counts)


class HistogramCounts:
    """Counts [rows, 4096] of one kind on one device, and a spare for when they are taken.

    On the CPU the spare takes their place; on a GPU a stream beside the training's copies them to
    pinned memory and zeroes them.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._used: deque[Tensor] = deque()
        self._free: deque[Tensor] = deque([self._new()])
        self._copied: torch.Event | None = None
        self._counting = False  # since the last take
        if device.type == "cpu":
            self._counts = self._new()
        else:
            self._counts = torch.zeros((rows, BINS), dtype=torch.int64, device=device)
            self._stream = copy_stream(device)

    @property
    def ready(self) -> bool:
        """Whether the counts can be taken: the last ones have been read."""
        return bool(self._free)

    def accumulator(self) -> Tensor:
        """[rows, 4096] int64 on the device: what the next step adds to."""
        self._counting = True
        if self._copied is not None:  # the device waits until the last ones are copied and zeroed
            torch.accelerator.current_stream(self._device).wait_event(self._copied)
            self._copied = None
        return self._counts

    def take(self) -> TakenCounts:
        """What was counted since the last take; only when `ready`."""
        spare, self._counting = self._free.popleft(), False
        if self._device.type == "cpu":
            taken, self._counts = self._counts, spare
            return TakenCounts(taken, None, self._used)
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            spare.copy_(self._counts, non_blocking=True)
            self._counts.zero_()
            self._copied = self._stream.record_event()
        return TakenCounts(spare, self._copied, self._used)

    def restart(self) -> bool:
        """Forget what was counted since the last take; whether there was anything."""
        if not self._counting:
            return False
        if self._device.type == "cpu":
            self._counts = self._new()  # costs less than to zero the old ones
        else:
            self.accumulator().zero_()
        self._counting = False
        return True

    def clean(self) -> None:
        """Make what has been read ready for use again; on the publisher's thread."""
        while self._used:
            counts = self._used.popleft()
            if self._device.type == "cpu":
                # Not by torch, in parallel: OpenMP would keep a team of threads for this thread,
                # and where teams are larger than the machine the training's own no longer spins
                # between two operations, which costs small ones a quarter of their time.
                counts.numpy().fill(0)
            self._free.append(counts)
        if not self._free:  # a sink keeps the counts of a publication
            self._free.append(self._new())

    def _new(self) -> Tensor:
        if self._device.type == "cpu":
            # NumPy's zeros are pages that the system zeroes when they are first touched, which
            # costs nothing here; torch would write them all.
            return torch.from_numpy(np.zeros((self._rows, BINS), dtype=np.int64))
        return torch.empty((self._rows, BINS), dtype=torch.int64, pin_memory=True)
