"""Gradients that nobody clears: each step's are added to those of all steps before."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.rule import Run, Symptom
from pyvizllm.telemetry.records import Floats

STEPS = 64


class UnclearedGradients:
    """From the first step on, gradients grow as the sum of all steps' gradients does.

    Of n independent gradients the sum is sqrt(n) times as long as one, of equal ones n times, while
    the gradient of a model that is trained is about as long in the eighth step as in the first. So
    at least 2 times after 8 steps and 4 times after 64 are asked for, and the ratio of von Neumann
    (1941) of each parameter's sum of elements, the mean square of its steps over its variance: 2
    for independent values, 6 / n for their sums. That of the steps themselves is 2 at most, as they
    are gradients; it is 3 for differences of independent values.

    Gradients of all data at once may grow as smoothly, from a start near 0: but hardly in the
    second step, when a sum is sqrt(2) to 2 times as long, or by more than 8 times in 8 steps.
    """

    name: ClassVar[str] = "uncleared_gradients"
    lasting: ClassVar[bool] = False
    SECOND, EARLY, EARLY_GROWTH, GROWTH = 1.25, 8, 2.0, 4.0
    SMOOTH, FRESH = 0.2, 2.3  # ratios of the sums and of their steps

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: list[Floats] = []  # [n, T] each
        self._squares: list[Floats] = []
        self._count = 0

    def look(self, run: Run) -> Symptom | None:
        new = run.new
        if self._count >= STEPS or "grad" not in new.statistics:
            return None
        if new.names != (self._names or new.names):  # parameters have come or gone
            self._count = STEPS
            return None
        self._names = new.names
        measured = new.statistic("grad", "numel") > 0
        self._sums.append(np.where(measured, new.statistic("grad", "sum"), np.nan))
        self._squares.append(np.where(measured, new.statistic("grad", "sum_squares"), np.nan))
        self._count += len(new)
        return self._judge() if self._count >= STEPS else None

    def _judge(self) -> Symptom | None:
        sums, squares = np.concatenate(self._sums)[:STEPS], np.concatenate(self._squares)[:STEPS]
        self._sums, self._squares = [], []
        known = np.isfinite(sums).all(0)
        if not known.any():
            return None
        norms = np.sqrt(squares[:, known].sum(1))
        smooth, fresh = _von_neumann(sums[:, known]), _von_neumann(np.diff(sums[:, known], axis=0))
        early, late = norms[self.EARLY - 1] / norms[0], np.median(norms[STEPS // 2 :]) / norms[0]
        at_once = norms[1] >= self.SECOND * norms[0]
        grown = self.EARLY_GROWTH <= early <= 2 * self.EARLY and late >= self.GROWTH
        if not (at_once and grown and smooth < self.SMOOTH and fresh < self.FRESH):
            return None
        return Symptom(
            "serious",
            f"gradients add up from step to step: their norm was {early:.3g} times the first "
            f"step's in step {self.EARLY} and {norms[-1] / norms[0]:.3g} times in step {STEPS}, "
            f"each close to the one before (von Neumann's ratio {smooth:.2g}; of gradients that "
            "are cleared, 2)",
            "Call optimizer.zero_grad() in every step, before backward or after optimizer.step().",
            {"growth": float(norms[-1] / norms[0]), "von_neumann_ratio": smooth},
        )


def _von_neumann(values: Floats) -> float:
    """Of values [n, T] in their order: the median over the columns; 2 where none varies."""
    steps = np.square(np.diff(values, axis=0)).mean(0)
    variance = values.var(0)
    ratios = steps[variance > 0] / variance[variance > 0]
    return float(np.median(ratios)) if len(ratios) else 2.0
