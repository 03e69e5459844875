"""What the loss has done since the run began: where it started, its best level, its noise."""

from __future__ import annotations

import numpy as np

from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import Floats

START = 10  # steps whose median is where the loss began
WINDOW = 32  # steps whose median is the loss's level
_STRIDE = 8  # rows between two levels that may be the best


class LossTrack:
    """Follows the loss of every step; what is not finite does not count.

    `initial` is the median of the first ten steps, `level` that of the last 32, `best` the lowest
    level so far, `noise` the standard deviation from one step to the next without the trend. All
    are NaN until there are enough steps.
    """

    def __init__(self) -> None:
        self.initial = np.nan
        self.level = np.nan
        self.best = np.nan
        self.noise = np.nan
        self.count = 0
        self.latest: Floats = np.empty(0)  # [<= history's limit] the finite losses

    def add(self, history: History, rows: int) -> None:
        """Take in the last `rows` steps of the history."""
        loss = history.loss()
        new = int(np.isfinite(loss[len(loss) - min(rows, len(loss)) :]).sum())
        loss = loss[np.isfinite(loss)]
        self.latest = loss
        self.count += new
        if self.count < START:
            return
        if np.isnan(self.initial):
            self.initial = float(np.median(loss[:START]))
        self.noise = noise(loss[-2 * WINDOW :])
        for end in range(len(loss), len(loss) - max(new, 1), -_STRIDE):
            if end < WINDOW:
                break
            level = float(np.median(loss[end - WINDOW : end]))
            if end == len(loss):
                self.level = level
            self.best = level if np.isnan(self.best) else min(self.best, level)

    @property
    def progress(self) -> float:
        """How far the best level is below the start; NaN until there is a level."""
        return self.initial - self.best

    @property
    def error(self) -> float:
        """Standard error of `initial` - `level`: 1.25 sigma / sqrt(n) of each median."""
        return 1.25 * self.noise * (1 / START + 1 / WINDOW) ** 0.5

    @property
    def improved(self) -> bool:
        """Whether it has fallen by 2 % of its start and by more than its noise explains."""
        least = max(0.02 * abs(self.initial), 2 * self.noise / WINDOW**0.5)
        return bool(self.initial - self.level > least)


def noise(losses: Floats) -> float:
    """Standard deviation of a step's loss about its trend, from differences of neighbours.

    1.4826 times the median absolute difference, over sqrt(2): the estimate of a normal
    distribution that a few wild steps do not spoil (Rousseeuw and Croux, 1993).
    """
    if len(losses) < 3:
        return float("nan")
    return 1.4826 * float(np.median(np.abs(np.diff(losses)))) / 2**0.5
