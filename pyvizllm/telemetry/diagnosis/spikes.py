"""Loss spikes, and losses that do not come down from one."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.learning_rate import RULE_OF_THUMB
from pyvizllm.telemetry.diagnosis.losses import WINDOW, LossTrack, noise
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom
from pyvizllm.telemetry.records import Floats

BEFORE = 64  # steps that a spike is compared with
RECENT = 16  # steps whose median is where the loss was
LONG = 5  # steps of a spike, by their median: one hard batch is no spike
SCORE = 6.0
LEAST = 0.05  # of the loss at the start


class LossSpike:
    """The loss leaps, for five steps, by 5 % of its start and twice as high as usual.

    The robust z-score of Iglewicz and Hoaglin (1993), (x - median) / (1.4826 MAD), calls 3.5 an
    outlier of a normal sample; losses of small batches have heavier tails, so it is 6 here, of the
    median of five steps, and twice as high as such medians came in the 32 steps before. The
    deviation is that from step to step, which a falling loss does not widen. A single step counts
    where it is three times the largest loss of the history and above that of the untrained model.
    """

    name: ClassVar[str] = "loss_spike"
    lasting: ClassVar[bool] = False

    def look(self, run: Run) -> Symptom | None:
        loss, numbers = run.history.loss(), run.history.numbers()
        finite = np.isfinite(loss)
        loss, numbers = loss[finite], numbers[finite]
        first = max(BEFORE, len(loss) - len(run.new) - LONG)
        for row in range(first, len(loss)):
            before = loss[max(0, row - BEFORE) : row]
            if loss[row] <= before.max():
                continue  # nothing begins here
            if symptom := self._judge(run.losses, loss, row, before, int(numbers[row])):
                return symptom
        return None

    @staticmethod
    def _judge(
        losses: LossTrack, loss: Floats, row: int, before: Floats, step: int
    ) -> Symptom | None:
        usual = float(np.median(before[-RECENT:]))
        deviation = max(noise(before), 1e-3 * abs(usual), 1e-12)
        during = loss[row : row + LONG]
        height = float(np.median(during)) if len(during) == LONG else -np.inf
        rise = height - usual
        long = (
            rise >= max(SCORE * deviation, LEAST * abs(losses.initial))
            and rise
            >= 2 * (_highest(before[-WINDOW:]) - usual)  # small batches have hard ones in a row
        )
        tall = loss[row] > 3 * np.abs(loss[:row]).max() and loss[row] > losses.initial
        if not (long or tall):
            return None
        top = float(during.max())
        score = (top - usual) / deviation
        return Symptom(
            "warning",
            f"the loss leapt to {top:.4g}, from a median of {usual:.4g} "
            f"({score:.0f} robust standard deviations)",
            "Look at the batches of these steps: data that has become harder is no fault. If it "
            "happens again, lower the learning rate or AdamW's beta2, clip the gradients' norm, or "
            "skip the batch and go back to the last checkpoint.",
            {"loss": top, "usual_loss": usual, "z_score": score},
            score=top,
            step=step,
        )


def _highest(losses: Floats) -> float:
    """The highest median of LONG neighbours."""
    windows = np.lib.stride_tricks.sliding_window_view(losses, LONG)
    return float(np.median(windows, axis=1).max())


class Divergence:
    """The loss stays far above its best level: half of what was learnt is lost again.

    Medians of 32 steps, two in a row, so a spike that recovers does not count. Where less than a
    fifth of the start had been learnt, it has to be 50 % and two deviations of its steps above the
    start, and not on its way down. In any case it is eight times as far up as levels usually stray:
    the best of many levels is itself three or four deviations below what is usual. It is over when
    half of its rise is made good.

    A leap, as from harder data, has time to come down: none is seen where the loss is below its
    start and would be below the limit within 128 steps if it went on falling as it does. What is
    below 0 does not count as learnt: the loss of a policy returns to 0 as it learns, and what is
    maximised goes up.
    """

    name: ClassVar[str] = "divergence"
    lasting: ClassVar[bool] = True
    LOST = 0.5
    LEARNT = 0.2  # of the start
    SURE = 8.0
    SOON = 4  # times the fall from one level to the next

    def __init__(self) -> None:
        self._over = np.nan  # the level below which a divergence that was seen is over

    def look(self, run: Run) -> Symptom | None:
        losses = run.losses
        if np.isnan(losses.before):
            return None
        start, best = losses.start, max(losses.best, 0.0)
        sure = self.SURE * max(losses.spread, 0.5 * losses.noise / WINDOW**0.5)
        if start - best > max(self.LEARNT * abs(start), sure):
            limit = best + max(self.LOST * (start - best), sure)
        else:
            rise = max(self.LOST * abs(start), 2 * losses.start_noise)  # 0 is no measure of a loss
            limit = max(start + rise, best + sure)
        low = min(losses.level, losses.before)
        if not low > np.fmin(limit, self._over):
            self._over = np.nan
            return None
        soon = losses.level - self.SOON * (losses.before - losses.level)
        if np.isnan(self._over) and losses.level < max(start, losses.initial) and soon < limit:
            return None
        best = min(losses.best, losses.initial)
        self._over = np.fmax(self._over, losses.best + 0.5 * (low - losses.best))
        return Symptom(
            "serious",
            f"the loss has gone up from {best:.4g} at its best to {losses.level:.4g} "
            f"(medians of {WINDOW} steps; {start:.4g} at the start)",
            "Go back to a checkpoint from before, with a lower learning rate, a longer warmup or "
            "clipped gradients. It is no fault where the data or the task has become harder.",
            {"loss": losses.level, "best_loss": best, "initial_loss": start},
            score=losses.level - best,
        )


class Plateau:
    """The last 256 steps brought nothing: no more than 1 % and no more than their noise.

    Only a note: a model that has converged stands on a plateau, too. The two halves' medians are
    compared with the error of a median, 1.25 sigma / sqrt(n).
    """

    name: ClassVar[str] = "plateau"
    lasting: ClassVar[bool] = True
    STEPS = 256

    def look(self, run: Run) -> Symptom | None:
        loss = run.losses.latest[-self.STEPS :]
        if len(loss) < self.STEPS or run.warming_up(self.STEPS):
            return None
        half = self.STEPS // 2
        early, late = float(np.median(loss[:half])), float(np.median(loss[half:]))
        error = 1.25 * run.losses.noise * (2 / half) ** 0.5
        least = max(0.01 * abs(early), error)
        if early - late > least:
            return None
        start = " since the start" if run.losses.count == self.STEPS else ""
        first = f"{early:.4g} in the first half of them"
        said = f"stayed at {late:.4g} for {self.STEPS} steps{start} ({first})"
        if late - early > least:
            said = f"not fallen for {self.STEPS} steps{start}: {first}, {late:.4g} in the second"
        return Symptom(
            "info",
            f"the loss has {said}",
            f"If it is not as low as it should be: {_way(run.ratios.latest)}, or look for a bound "
            "such as label noise or too small a model.",
            {"loss": late, "loss_before": early},
        )


def _way(ratios: Floats | None) -> str:
    """Which way the learning rate may have to go, by the update ratios, where they are extreme."""
    ratio = RULE_OF_THUMB if ratios is None else float(np.median(ratios))
    if RULE_OF_THUMB / 10 <= ratio <= 10 * RULE_OF_THUMB:
        return "change the learning rate"
    way = "lower" if ratio > RULE_OF_THUMB else "raise"
    return (
        f"{way} the learning rate (a step changes the weights by {100 * ratio:.2g} %; "
        f"{100 * RULE_OF_THUMB:.2g} % is usual)"
    )
