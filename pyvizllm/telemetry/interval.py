"""The steps between two publications: collected by the training thread, read by the publisher's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyvizllm.ops import TensorStats
from pyvizllm.telemetry.gradients import GradientSums
from pyvizllm.telemetry.records import Floats, HistogramTable, Publication


@dataclass
class Interval:
    """Sums over the steps of one interval; tensors stay on their devices.

    `started` and `ended` are readings of time.perf_counter, in seconds; a pause moves `started`.
    `numbers` are settings (the last value counts), `measurements` sums [] float64 and how many
    values are in each.
    """

    started: float
    ended: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    measurements: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    metrics: Tensor | None = None  # [53] float64, CrossEntropyMetrics.sums
    norm_sum: Tensor | None = None  # [] float64
    norm_max: Tensor | None = None  # [] float64
    steps: int = 0

    @property
    def empty(self) -> bool:
        """True if nothing was recorded."""
        return not (self.numbers or self.measurements or self.steps or self.metrics is not None)

    @torch.no_grad()
    def add_measurement(self, name: str, value: Tensor) -> None:
        """Add a value [] of any dtype; the tensor may change or be freed afterwards."""
        if name in self.measurements:
            total, count = self.measurements[name]
            self.measurements[name] = total.add_(value), count + 1
        else:
            self.measurements[name] = value.detach().to(torch.float64, copy=True), 1

    @torch.no_grad()
    def add_metrics(self, sums: Tensor) -> None:
        """Add one micro-batch's CrossEntropyMetrics.sums, [53]."""
        self.metrics = sums.detach().clone() if self.metrics is None else self.metrics.add_(sums)

    @torch.no_grad()
    def add_norm(self, norm: Tensor) -> None:
        """Add one step's gradient norm, []; NaN and Inf stay visible in the mean and the max."""
        self.steps += 1
        if self.norm_sum is None or self.norm_max is None:
            self.norm_sum, self.norm_max = norm.clone(), norm.clone()
        else:
            self.norm_sum += norm
            torch.maximum(self.norm_max, norm, out=self.norm_max)


class HostCopies:
    """Tensors on their way to the host: started without waiting, read on another thread.

    CPU tensors are handed over as they are, so whoever started the copies must not use them again.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [self._start(tensor) for tensor in tensors]
        self._events = []
        for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
            event = torch.Event(device)
            event.record(torch.accelerator.current_stream(device))
            self._events.append(event)

    def read(self) -> list[Tensor]:
        """Wait for the copies and return them; never called on the training thread."""
        for event in self._events:
            event.synchronize()  # sync point
        return self._tensors

    @staticmethod
    def _start(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)


class Snapshot:
    """An interval handed over at `step`; calling it, on the publisher's thread, reads it."""

    def __init__(self, step: int, interval: Interval, gradients: Sequence[GradientSums]) -> None:
        self._step, self._wall_time = step, time.time()
        self._numbers = interval.numbers
        self._seconds = interval.ended - interval.started
        self._steps = interval.steps
        self._measured = {name: count for name, (_, count) in interval.measurements.items()}
        self._has_metrics = interval.metrics is not None
        scalars = (interval.metrics, interval.norm_sum, interval.norm_max)
        tensors = [tensor for tensor in scalars if tensor is not None]
        self._scalars = HostCopies(tensors + [total for total, _ in interval.measurements.values()])
        self._gradients = [
            _GradientSnapshot(group, group.stats) for group in gradients if group.stats is not None
        ]

    def __call__(self) -> Publication:
        """Wait for the copies and work the numbers out."""
        scalars = self._read_scalars()
        histograms: list[HistogramTable] = []
        health = np.zeros(2)
        for group in self._gradients:
            health += group.read_into(scalars, histograms)
        if self._gradients:
            scalars |= {"health/nans": float(health[0]), "health/infs": float(health[1])}
        return Publication(self._step, self._wall_time, scalars, histograms)

    def _read_scalars(self) -> dict[str, float]:
        arrays = [tensor.numpy() for tensor in self._scalars.read()]  # sync point
        scalars: dict[str, float] = {}
        if self._has_metrics:
            scalars |= _loss_scalars(arrays.pop(0), self._seconds)
        if self._steps:
            scalars["train/grad_norm"] = float(arrays.pop(0)) / self._steps
            scalars["train/grad_norm_max"] = float(arrays.pop(0))
        for (name, count), total in zip(self._measured.items(), arrays, strict=True):
            scalars[f"train/{name}"] = float(total) / count
        return scalars | {f"train/{name}": float(value) for name, value in self._numbers.items()}


class _GradientSnapshot:
    """One device's gradient sums on their way to the host."""

    def __init__(self, group: GradientSums, stats: TensorStats) -> None:
        self._names = [name for name, _ in group.named_parameters]
        self._steps = np.array(group.steps)
        histogram = [] if group.histogram is None else [group.histogram]
        self._copies = HostCopies([stats.values, stats.counts, stats.total_norm, *histogram])

    def read_into(self, scalars: dict[str, float], histograms: list[HistogramTable]) -> Floats:
        """Add the norms and the histograms; returns the numbers of NaNs and Infs, [2]."""
        values, integers, total_norm, *counts = self._copies.read()
        stats = TensorStats(values, integers, total_norm, None)
        low, high, total, squares, norms = (
            getattr(stats, field).numpy()  # sync point
            for field in ("min", "max", "sum", "sum_squares", "norm")
        )
        seen = np.flatnonzero(self._steps)
        norms = norms[seen] / self._steps[seen]
        names = [self._names[i] for i in seen]
        scalars |= {f"grad_norm/{name}": float(n) for name, n in zip(names, norms, strict=True)}
        if counts:
            moments = np.stack((low, high, total, squares), axis=1)[seen]
            tags = tuple(f"grad/{name}" for name in names)
            histograms.append(HistogramTable(tags, counts[0].numpy()[seen], moments))  # sync point
        infs = stats.pos_infs.sum() + stats.neg_infs.sum()
        return torch.stack((stats.nans.sum(), infs)).double().numpy()  # sync point


def _loss_scalars(sums: Floats, seconds: float) -> dict[str, float]:
    """Token-weighted means from CrossEntropyMetrics.sums; NaN where no token counted."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        correct, loss, entropy = sums[1:4] / sums[0]
        perplexity = np.exp(loss)
    return {
        "train/loss": float(loss),
        "train/accuracy": float(correct),
        "train/perplexity": float(perplexity),
        "train/entropy": float(entropy),
        "train/tokens_per_second": float(sums[0]) / seconds,
    }
