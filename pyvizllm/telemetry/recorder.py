"""Collects a training's statistics on the device and hands them over without waiting.

The training thread only starts device work: sums over the steps of an interval are kept in
tensors beside the gradients, and at a publication those tensors themselves go to the publisher's
thread, which is the only one to read them; the next interval gets fresh ones.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics
from pyvizllm.telemetry.gradients import GradientStatistics
from pyvizllm.telemetry.interval import Interval, Snapshot
from pyvizllm.telemetry.publisher import Publisher


class Recorder:
    """Records what one optimizer sees: loss metrics, gradient norms, gradient histograms.

    For each optimizer step: `log_metrics` once per micro-batch, then `observe_gradients()` (before
    clipping), then `log(...)`, then `step(number)`. No method reads a device value or waits for
    the disk. Everything is accumulated over all steps between two publications.

    Arguments:
        named_parameters: (name, parameter) pairs; a tied parameter counts under its first name.
        publisher: receives a snapshot every `every` steps.
        every: optimizer steps between two publications.
        histograms: also count every gradient's values (32 KiB a parameter).
        start_step: the last step done before this recorder, e.g. that of the checkpoint.
    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        publisher: Publisher,
        *,
        every: int,
        histograms: bool = True,
        start_step: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"Recorder: expected every of at least 1, got {every}")
        self._gradients = GradientStatistics(named_parameters, histograms=histograms)
        self._publisher = publisher
        self._every = every
        self._step = start_step
        self._interval = Interval(started=time.perf_counter())

    def observe_gradients(self) -> Tensor:
        """Measure every gradient as it is now; call once a step, accumulated and unclipped.

        Returns the norm of all gradients together: float64, [], on the gradients' device.
        Raises TypeError for a sparse gradient.
        """
        norm = self._gradients.observe()
        self._interval.add_norm(norm)
        return norm

    def log(self, **scalars: float | Tensor) -> None:
        """Show values as `train/NAME`.

        A number is a setting, such as the learning rate: the interval's last one is shown. A
        0-dimensional tensor is a measurement, such as a loss: the interval's mean is shown.
        """
        for name, value in scalars.items():
            if not isinstance(value, Tensor):
                self._interval.numbers[name] = value
            elif value.dim() == 0:
                self._interval.add_measurement(name, value)
            else:
                shape = list(value.shape)
                raise ValueError(f"Recorder.log: expected {name} of shape [], got {shape}")

    def log_metrics(self, metrics: CrossEntropyMetrics) -> None:
        """Add the loss metrics of one micro-batch; shown as the interval's means over tokens."""
        self._interval.add_metrics(metrics.sums)

    def step(self, step: int) -> None:
        """End optimizer step number `step` (the first is 1); publish on multiples of `every`.

        Raises ValueError if `step` is not above the last one.
        """
        if step <= self._step:
            raise ValueError(f"Recorder.step: expected a step after {self._step}, got {step}")
        self._step = step
        if step % self._every == 0:
            self.publish(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent within, on an evaluation or a checkpoint, out of tokens/s."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._interval.started += time.perf_counter() - begin

    def publish(self, step: int) -> None:
        """Hand over what has been recorded since the last publication, if anything, as `step`."""
        interval, gradients = self._interval, self._gradients.take()
        if interval.empty and not gradients:
            return
        interval.ended = time.perf_counter()
        self._interval = Interval(started=interval.ended)
        self._publisher.submit(Snapshot(step, interval, gradients))
