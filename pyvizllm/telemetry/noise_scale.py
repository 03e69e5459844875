"""The gradient noise scale: how large a batch has to be for its gradient to be mostly signal."""

from __future__ import annotations

import numpy as np

from pyvizllm.telemetry.assembler import Draft
from pyvizllm.telemetry.records import Steps

TAG = "noise/scale"
_MEMORY = 100.0  # steps over which the estimates are averaged
_LEAST_STEPS = 10


class NoiseScale:
    """B_simple = tr(Sigma) / |G|^2 of McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1).

    G is the true gradient and Sigma the covariance of a single example's. Of two batches of b < B
    examples, E |G_b|^2 = |G|^2 + tr(Sigma) / b, so that their squared norms give both. Here the
    small batch is the first micro-batch of a step and the large one the whole step. Either estimate
    is averaged over some 100 steps before the ratio is taken, which otherwise would be biased.

    What is assumed: the gradient of the step is the mean over all its examples (or counted targets:
    the unit of the result is that of the micro-batches' sizes); micro-batches are drawn
    independently; nothing in the model depends on the other examples of a batch, as batch norm
    does. Steps under a GradScaler are left out, since the gradients of their micro-batches are
    still scaled.
    """

    def __init__(self) -> None:
        self._signal = self._noise = 0.0  # decaying sums of the estimates of |G|^2 and tr(Sigma)
        self._steps = 0

    def add(self, steps: Steps) -> None:
        """Take note of steps; of those with two or more micro-batches of known sizes."""
        batches = steps.micro_batches
        if batches is None or batches.seen.shape[1] < 2 or "grad" not in steps.statistics:
            return
        if steps.skipped is not None:
            return
        small = batches.sizes[:, 0].astype(np.float64)
        large = np.where(batches.seen, batches.sizes, 0).sum(axis=1).astype(np.float64)
        known = np.where(batches.seen, batches.sizes, 1).min(axis=1) > 0
        measured = steps.statistic("grad", "numel") > 0
        squares = np.where(measured, steps.statistic("grad", "sum_squares"), 0.0).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            # What has been accumulated after the first micro-batch is its share of the mean.
            of_small = batches.squared_norms[:, 0] * (large / small) ** 2
            signal = (large * squares - small * of_small) / (large - small)
            noise = (of_small - squares) / (1 / small - 1 / large)
        usable = batches.seen[:, :2].all(axis=1) & known & np.isfinite(signal) & np.isfinite(noise)
        for g, s in zip(signal[usable].tolist(), noise[usable].tolist(), strict=True):  # numpy
            keep = 1 - 1 / _MEMORY
            self._signal, self._noise = keep * self._signal + g, keep * self._noise + s
            self._steps += 1

    def value(self) -> float | None:
        """The noise scale; None before ten steps, and where noise drowns every signal."""
        if self._steps < _LEAST_STEPS or self._signal <= 0 or self._noise <= 0:
            return None
        return self._noise / self._signal

    def publish(self, draft: Draft) -> None:
        """Show the noise scale as it is now."""
        value = self.value()
        if value is not None:
            draft.scalars[TAG] = value
