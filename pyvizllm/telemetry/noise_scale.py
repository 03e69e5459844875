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
    small batch is the first micro-batch of a step and the large one all but the last, or both where
    there are two: norms taken after a backward, which no clipping and no unscaling has changed. A
    GradScaler's factor is in both of them and leaves the ratio as it is. Either estimate is
    averaged over some 100 steps before the ratio is taken, which otherwise would be biased.

    What is assumed: the gradients that add up are in proportion to the micro-batches' sizes, in
    examples or counted targets, which is the unit of the result; micro-batches are drawn
    independently; nothing in the model depends on the other examples of a batch, as batch norm
    does.
    """

    def __init__(self) -> None:
        self._signal = self._noise = 0.0  # decaying sums of the estimates of |G|^2 and tr(Sigma)
        self._steps = 0

    def add(self, steps: Steps) -> None:
        """Take note of steps; of those with two or more micro-batches of known sizes."""
        batches = steps.micro_batches
        if batches is None or batches.seen.shape[1] < 2:
            return
        count, rows = batches.seen.sum(axis=1), np.arange(len(steps))
        last = np.maximum(count - 2, 1)  # of the large batch
        known = np.where(batches.seen, batches.sizes, 1).min(axis=1) > 0
        sizes = np.where(batches.seen, batches.sizes, 0).astype(np.float64)
        small, large = sizes[:, 0], sizes.cumsum(axis=1)[rows, last]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            # What has been accumulated is the mean gradient times the size, but for a factor.
            of_small = batches.squared_norms[:, 0] / small**2
            of_large = batches.squared_norms[rows, last] / large**2
            signal = (large * of_large - small * of_small) / (large - small)
            noise = (of_small - of_large) / (1 / small - 1 / large)
        usable = (count > 1) & known & np.isfinite(signal) & np.isfinite(noise)
        if steps.skipped is not None:
            usable &= ~steps.skipped
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
