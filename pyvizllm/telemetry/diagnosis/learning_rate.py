"""Learning rate too high or too low, by the size of the updates and by what the loss does."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.depth import vanishes
from pyvizllm.telemetry.diagnosis.ratios import WINDOW
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom

RULE_OF_THUMB = 1e-3


class LearningRateTooHigh:
    """Updates above 1 % of the weights while the loss rises, or does not fall for 192 steps.

    The rule of thumb is 1e-3 (Karpathy, CS231n, "ratio of weights:updates"); a decade above it is
    common early in training and no fault while the loss falls. It has risen where it is three
    standard errors of the difference above its start. Where updates are below 3 %, it is serious
    where it has risen by half of its start; that it has not fallen has many causes, and is noted.

    At 90 % of the weights that it leaves, whatever the loss does, a step was about twice as long as
    those that it found: what they were initialised to, or had learnt, is gone.
    """

    name: ClassVar[str] = "learning_rate_too_high"
    lasting: ClassVar[bool] = True
    HIGH, VERY_HIGH = 10 * RULE_OF_THUMB, 30 * RULE_OF_THUMB
    FAR = 0.5  # of the start
    OVERWHELMING = 0.9
    PATIENCE = 192  # steps that a loss may take to begin to fall; one that rises has none

    def look(self, run: Run) -> Symptom | None:
        ratios = run.ratios.latest
        if ratios is None:
            return None
        losses = run.losses
        largest, ratio = float(ratios.max()), float(np.median(ratios))
        fallen, start = losses.initial - losses.level, abs(losses.initial)
        risen = -fallen > max(0.05 * start, 3 * losses.error)
        flat = fallen < 0.02 * start and losses.count >= self.PATIENCE
        if largest > self.OVERWHELMING:
            return self._overwhelmed(largest)
        if not (ratio > self.HIGH and (risen or flat)):
            return None
        grave = ratio > self.VERY_HIGH or (risen and -fallen > self.FAR * start)
        return Symptom(
            "serious" if grave else "warning" if risen else "info",
            f"a step changes the weights by {100 * ratio:.2g} % (median over the weight matrices; "
            f"0.1 % is usual), and the loss has not fallen: {losses.initial:.4g} at first, "
            f"{losses.level:.4g} now",
            f"Lower the learning rate, by about {_power(ratio / RULE_OF_THUMB)} times.",
            {"update_ratio": ratio, "loss": losses.level, "initial_loss": losses.initial},
            score=ratio,
        )

    @staticmethod
    def _overwhelmed(ratio: float) -> Symptom:
        return Symptom(
            "serious",
            f"a step was {100 * ratio:.0f} % as long as the weights that it left (median over the "
            "weight matrices; 0.1 % is usual): it replaced what was there",
            f"Lower the learning rate, by about {_power(ratio / RULE_OF_THUMB)} times, or warm up "
            "from 0.",
            {"update_ratio": ratio},
            score=ratio,
        )


class LearningRateTooLow:
    """Updates that have never been above 1e-5 of the weights, after warmup, and a flat loss.

    Two decades below the rule of thumb a weight needs 100,000 steps to change by its own size. A
    rate that has decayed from a useful one is no fault, so the largest ratio so far counts. Where
    gradients vanish with depth, no rate is right for all layers: that is said instead.
    """

    name: ClassVar[str] = "learning_rate_too_low"
    lasting: ClassVar[bool] = True
    LOW = RULE_OF_THUMB / 100
    HOPELESS = LOW / 10
    LEAST_STEPS = 100

    def __init__(self) -> None:
        self._largest = 0.0

    def look(self, run: Run) -> Symptom | None:
        ratios = run.ratios.latest
        if ratios is None:
            return None
        # Of the largest, as what a schedule decays to is no worse; and with no score, said once.
        self._largest = largest = max(self._largest, float(np.median(ratios)))
        if largest >= self.LOW or run.losses.improved or run.warming_up(WINDOW):
            return None
        if len(run.history) < self.LEAST_STEPS or vanishes(run):
            return None
        losses = run.losses
        flat = f", and the loss has not fallen since it was {losses.initial:.4g}"
        times = f", by about {_power(RULE_OF_THUMB / largest)} times" if largest > 0 else " from 0"
        return Symptom(
            "serious" if largest < self.HOPELESS else "warning",
            f"a step changes the weights by {100 * largest:.2g} % at most (median over the weight "
            f"matrices; 0.1 % is usual){'' if np.isnan(losses.initial) else flat}",
            f"Raise the learning rate{times}; look for a factor in the schedule that is close to "
            "0.",
            {"update_ratio": largest, "loss": losses.level, "initial_loss": losses.initial},
        )


def _power(factor: float) -> str:
    return f"{10 ** round(np.log10(max(factor, 1.0))):,.0f}"
