"""What the loss is given: probabilities instead of logits, or a sign too many."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.classes import TOKENS, Classes
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom

_LOG_SUM_EXP = 4  # column of CrossEntropyMetrics.sums


class ProbabilitiesAsLogits:
    """The logits' log-sum-exp has always been where that of probabilities is: softmax twice.

    Of C probabilities, log(sum(exp(p))) is between log(C) + 1 / C, where all are equal (Jensen),
    and log(e + C - 1), where one is 1: 0.06 nats apart for ten classes, 0.003 for 256. Logits pass
    through that as they grow; probabilities cannot leave it while the loss falls, and a loss of
    less than log(1 + (C - 1) / e) is out of their reach.
    """

    name: ClassVar[str] = "probabilities_as_logits"
    lasting: ClassVar[bool] = True
    STEPS = 128
    ROUNDING = 1e-4

    def __init__(self) -> None:
        self._classes = Classes()
        self._lowest, self._highest = np.inf, -np.inf
        self._count = 0

    def look(self, run: Run) -> Symptom | None:
        classes, _ = self._classes.find(run)
        sums = run.history.metrics(len(run.new))
        means = sums[:, _LOG_SUM_EXP] / sums[:, TOKENS]
        means = means[np.isfinite(means)]
        self._lowest = min(self._lowest, means.min(initial=np.inf))
        self._highest = max(self._highest, means.max(initial=-np.inf))
        self._count += len(means)
        if classes < 2 or self._count < self.STEPS or not run.losses.improved:
            return None
        least, most = np.log(classes) + 1 / classes, np.log(np.e + classes - 1)
        if self._lowest < least - self.ROUNDING or self._highest > most + self.ROUNDING:
            return None
        floor = float(np.log1p((classes - 1) / np.e))
        return Symptom(
            "warning",
            f"the logits' log-sum-exp has been between {self._lowest:.5g} and {self._highest:.5g} "
            f"in all {self._count} steps, as it is of {classes} probabilities, which sum up to 1 "
            f"({least:.5g} to {most:.5g}): no loss below {floor:.4g} can be reached with them",
            "Give the loss the logits: cross_entropy applies softmax itself.",
            {"lowest": self._lowest, "highest": self._highest, "classes": float(classes)},
        )


class WrongSign:
    """The loss began below 0 and falls faster and faster, as one without a minimum does.

    Cross-entropies, squared and absolute errors are never below 0, and what has a minimum is
    approached ever more slowly: told where the loss is more than twice as far below 0 as half of
    the steps ago, and twenty times as far as at the start.
    """

    name: ClassVar[str] = "wrong_sign"
    lasting: ClassVar[bool] = True
    TIMES = 20.0
    NOISE = 3.0  # deviations of a step's loss by which it began below 0

    def look(self, run: Run) -> Symptom | None:
        losses = run.losses
        if not losses.initial < -self.NOISE * losses.start_noise:
            return None
        level, halfway = losses.level, losses.halfway
        if not (level < self.TIMES * losses.initial and level < 2 * min(halfway, 0.0)):
            return None
        return Symptom(
            "serious",
            f"the loss falls faster and faster below 0: {losses.initial:.4g} at first, "
            f"{halfway:.4g} halfway and {level:.4g} after {losses.count} steps; no cross-entropy "
            "and no squared error is below 0",
            "See that the sign of the loss is right: the optimizer makes it small, or large with "
            "maximize=True.",
            {"loss": level, "initial_loss": losses.initial},
        )
