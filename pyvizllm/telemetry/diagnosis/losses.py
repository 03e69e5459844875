"""What the loss has done since the run began: where it started, its best level, its noise."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

import numpy as np

from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import Floats

START = 10  # steps whose median is where the loss began
WINDOW = 32  # steps whose median is the loss's level
_STRIDE = 8  # rows between two levels that may be the best
_MOST_LEVELS = 1024
_LEAST_LEVELS = 8  # that tell how much levels vary
_WITHIN = 24  # levels whose steps do


class LossTrack:
    """Follows the loss of every step; what is not finite does not count.

    `initial` is the median of the first ten steps, `level` that of the last 32, `before` that of
    the 32 before those, `start` that of the first 32 and `start_noise` their deviation from a line,
    `best` the lowest level so far, `noise` the standard deviation from one step to the next without
    the trend. All are NaN until there are enough steps.
    """

    def __init__(self) -> None:
        self.initial = np.nan
        self.level = np.nan
        self.before = np.nan
        self.start = np.nan
        self.start_noise = np.nan
        self.best = np.nan
        self.noise = np.nan
        self.count = 0
        self.latest: Floats = np.empty(0)  # [<= history's limit] the finite losses
        # Levels side by side, how far their steps are from a line, and the steps of the next one.
        self._levels: deque[float] = deque(maxlen=_MOST_LEVELS)
        self._within: deque[float] = deque(maxlen=_WITHIN)
        self._ends: deque[int] = deque(maxlen=_MOST_LEVELS)  # the last step of each level
        self._rest: Floats = np.empty((0, 2))  # losses and the numbers of their steps

    def add(self, history: History, rows: int) -> None:
        """Take in the last `rows` steps of the history."""
        loss = history.loss()
        finite = np.isfinite(loss)
        new = int(finite[len(loss) - min(rows, len(loss)) :].sum())
        loss, numbers = loss[finite], history.numbers()[finite]
        self.latest = loss
        self.count += new
        numbered = np.stack((loss, numbers.astype(np.float64)), axis=1)
        self._add_levels(numbered[len(loss) - new :])
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
                if end >= 2 * WINDOW:
                    self.before = float(np.median(loss[-2 * WINDOW : -WINDOW]))
            self.best = level if np.isnan(self.best) else min(self.best, level)

    def _add_levels(self, losses: Floats) -> None:
        """Take in losses and the numbers of their steps [n, 2]."""
        self._rest = np.concatenate((self._rest, losses))
        while len(self._rest) >= WINDOW:
            window, self._rest = self._rest[:WINDOW], self._rest[WINDOW:]
            self._levels.append(float(np.median(window[:, 0])))
            self._within.append(_about_line(window[:, 0]))
            self._ends.append(int(window[-1, 1]))
        if np.isnan(self.start) and self._levels:
            self.start, self.start_noise = self._levels[0], self._within[0]

    def level_at(self, step: int) -> float:
        """The level of the 32 steps of which `step` is one; NaN while they are not complete."""
        place = bisect_left(self._ends, step)
        return self._levels[place] if place < len(self._levels) else np.nan

    @property
    def halfway(self) -> float:
        """The level in the middle of the steps so far; NaN before there are any."""
        return self._levels[len(self._levels) // 2] if self._levels else np.nan

    @property
    def spread(self) -> float:
        """About the standard deviation of levels from their trend; NaN before the first.

        Until the best level a loss falls, and noise is what goes up; after it, the other way round.
        Differences are of levels 1, 2, 4 and 8 apart: noise that lasts for hundreds of steps is not
        seen in neighbours. It is at least a quarter of the largest move that was taken back, and
        that of the steps while there are few levels. The last two, which are to be judged by it,
        are left out.
        """
        if not self._levels:
            return np.nan
        levels = np.array(self._levels)[:-2]
        best = int(levels.argmin()) if len(levels) else 0
        falling, rising = levels[: best + 1], -levels[best:]
        taken_back = max(_rise(falling), _rise(rising))
        sides = [side for side in (falling, rising) if len(side) >= _LEAST_LEVELS]
        known = [_spread_of(side) for side in sides] or [float(np.median(self._within))]
        return max(0.25 * taken_back, *known)

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


def _about_line(values: Floats) -> float:
    """The standard deviation of normal values from a line through them, by the median distance."""
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    rest = values - values.mean() - steps * (steps @ values) / (steps @ steps)
    return 1.4826 * float(np.median(np.abs(rest)))


def _rise(levels: Floats) -> float:
    """The largest, from the lowest level before."""
    return float((levels - np.minimum.accumulate(levels)).max(initial=0.0))


def _spread_of(levels: Floats) -> float:
    """Of levels that fall; taken for more, the fewer they are, as it may be that they hide it."""
    lags = [lag for lag in (1, 2, 4, 8) if 3 * lag <= len(levels)]
    found = max(_upward(levels[lag:] - levels[:-lag]) for lag in lags)
    return found * (1 + 12 / len(levels))


def _upward(differences: Floats) -> float:
    """The standard deviation of values with these differences, from the upper two quarters."""
    middle, upper = np.quantile(differences, (0.5, 0.75)).tolist()
    return 1.4826 * max(0.0, upper - max(0.0, middle)) / 2**0.5
