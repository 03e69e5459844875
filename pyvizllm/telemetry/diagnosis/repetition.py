"""Data that comes again too soon: seen in the loader's sample ids, or in the losses alone."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.losses import WINDOW
from pyvizllm.telemetry.diagnosis.nonfinite import flat_samples
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom
from pyvizllm.telemetry.records import Floats, Steps


class RepeatedSamples:
    """Half of the samples come again before a quarter of the others has been seen.

    Over epochs that are shuffled anew, two uses of a sample lie within a quarter of an epoch in
    1/32 of all cases; drawn with replacement, in 22 %. Loader workers that all read the whole data
    set repeat nearly every sample at once.
    """

    name: ClassVar[str] = "repeated_samples"
    lasting: ClassVar[bool] = True
    SHARE = 0.5
    NEAR = 0.25  # of the distinct samples so far
    SAMPLES = 512
    MOST = 1_000_000  # ids that are remembered

    def __init__(self) -> None:
        self._last: dict[object, int] = {}
        self._count = 0
        self._soon: list[bool] = []  # of the last SAMPLES samples: whether they came again soon

    def look(self, run: Run) -> Symptom | None:
        for ids in _ids(run.new):
            before = self._last.get(ids)
            near = self.NEAR * len(self._last)
            self._soon.append(before is not None and self._count - before <= near)
            if before is not None or len(self._last) < self.MOST:
                self._last[ids] = self._count
            self._count += 1
        del self._soon[: -self.SAMPLES]
        # A set of a few samples is gone through within a step or two.
        if len(self._soon) < self.SAMPLES or len(self._last) < 64:
            return None
        share = sum(self._soon) / len(self._soon)
        if share < self.SHARE:
            return None
        return Symptom(
            "warning",
            f"{100 * share:.0f} % of the last {self.SAMPLES} samples had been used just before; "
            f"{len(self._last):,} different ones were seen in {self._count:,}",
            "Check the sampler: an IterableDataset must split its data among the workers "
            "(get_worker_info) and the ranks.",
            {"share": share, "distinct": float(len(self._last)), "samples": float(self._count)},
            score=share,
        )


class RepeatedLosses:
    """The losses recur with a period: the same batches in the same order.

    The autocorrelation of the losses, less their moving median, over 256 steps: 0.6 at the
    period and at twice the period, where chance gives 1 / sqrt(256) = 0.06 (Bartlett, 1946), and
    less than half of that one step beside it, which drift would not. The trend of the loss is
    slower than that. Neighbours must not be alike either, as they are where several steps are taken
    on one batch, nor may the rhythm be that of one step in a period, such as a harder task at every
    tenth. Whether a period of one epoch is meant (no shuffling) the losses cannot tell; nor, in
    periods of fewer than 8, whether it is tasks or data sets that take turns.
    """

    name: ClassVar[str] = "repeated_losses"
    lasting: ClassVar[bool] = True
    STEPS = 256
    SHORTEST = 8
    CORRELATION = 0.6

    def look(self, run: Run) -> Symptom | None:
        losses = run.losses.latest[-self.STEPS :]
        if len(losses) < self.STEPS:
            return None
        losses = _without_trend(losses)
        best, correlation = self._period(losses)
        if best < self.SHORTEST or self._period(_without_loudest(losses, best))[0] != best:
            return None
        return Symptom(
            "warning",
            f"the losses repeat every {best} steps (autocorrelation {correlation:.2f}): the "
            "same batches come again in the same order",
            "Shuffle the data anew each epoch (DataLoader(shuffle=True)); if an epoch is longer "
            f"than {best} steps, look for a loader that starts again too soon.",
            {"period": float(best), "autocorrelation": correlation},
        )

    def _period(self, losses: Floats) -> tuple[int, float]:
        """The shortest one, and the autocorrelation at it; zeros where there is none.

        What repeats every 12 steps may do so because it nearly does every 4: then that is it.
        """
        correlations = autocorrelation(losses)
        for lag in range(3, self.STEPS // 3):
            beside = max(correlations[1], correlations[lag - 1], correlations[lag + 1])
            strong = min(correlations[lag], correlations[2 * lag]) >= self.CORRELATION
            if strong and beside < 0.5 * correlations[lag]:
                parts = [p for p in range(2, lag + 1) if lag % p == 0]
                period = next(p for p in parts if correlations[p] >= 0.5 * correlations[lag])
                return period, float(correlations[period])
        return 0, 0.0


def autocorrelation(values: Floats) -> Floats:
    """[n] of values [n]: correlation of the values with themselves `lag` steps later."""
    centred = values - values.mean()
    size = len(values)
    spectrum = np.abs(np.fft.rfft(centred, 2 * size)) ** 2
    sums = np.fft.irfft(spectrum)[:size]
    if sums[0] <= 0:
        return np.zeros(size)
    pairs = np.arange(size, 0, -1)  # fewer at longer lags: a mean, and not a sum
    return (sums / pairs) / (sums[0] / size)


def _without_trend(losses: Floats) -> Floats:
    """Losses less the moving median of 32, cut at 4 deviations: one spike is no rhythm."""
    half = WINDOW // 2
    padded = np.pad(losses, (half, half), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    rest = losses - np.median(windows, axis=1)
    deviation = 1.4826 * float(np.median(np.abs(rest)))
    return np.clip(rest, -4 * deviation, 4 * deviation)


def _without_loudest(losses: Floats, period: int) -> Floats:
    """Losses less their trend, 0 at that step of the period that differs most from the others."""
    loudness = [abs(losses[phase::period].mean()) for phase in range(period)]
    rest = losses.copy()
    rest[int(np.argmax(loudness)) :: period] = 0.0
    return rest


def _ids(steps: Steps) -> list[object]:
    if steps.micro_batches is None:
        return []
    return flat_samples([list(row) for row in steps.micro_batches.sample_ids])
