"""Over-fitting: the loss on unseen data rises while that on the training data falls."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.rule import Run, Symptom


class Overfitting:
    """Three evaluations in a row more than 20 % above the best one, while the training loss fell.

    Prechelt (1998, "Early stopping - but when?"): the generalisation loss 100 (E / E_best - 1)
    above a threshold, and rises over successive evaluations; he uses 1 to 5 % to stop, and a
    diagnosis may take its time.
    """

    name: ClassVar[str] = "overfitting"
    lasting: ClassVar[bool] = True
    RISE = 0.2
    FALL = 0.02  # of the training loss
    SUCCESSIVE = 3

    def __init__(self) -> None:
        self._tag = ""
        self._best: tuple[float, int] | None = None  # eval loss, step
        self._train_then = np.nan  # the training loss at that step, which may be known only later
        self._above: list[tuple[int, float]] = []

    def evaluated(self, step: int, tag: str, loss: float) -> None:
        """Take in an evaluation, whose loss is called `tag`."""
        self._tag = tag
        if not np.isfinite(loss):
            return
        if self._best is None or loss < self._best[0]:
            self._best, self._train_then, self._above = (loss, step), np.nan, []
        elif loss - self._best[0] > self.RISE * abs(self._best[0]):
            self._above.append((step, loss))
        else:
            self._above = []

    def look(self, run: Run) -> Symptom | None:
        if self._best is None:
            return None
        best, at = self._best
        if np.isnan(self._train_then):
            self._train_then = run.losses.level_at(at)
        if len(self._above) < self.SUCCESSIVE:
            return None
        step, loss = self._above[-1]
        train_then, train_now = self._train_then, run.losses.level
        if not train_then - train_now > self.FALL * abs(train_then):
            return None
        return Symptom(
            "warning",
            f"{self._tag} has risen from {best:.4g} at step {at} to {loss:.4g} at step {step}, "
            f"while the training loss fell from {train_then:.4g} to {train_now:.4g}",
            f"Use the checkpoint near step {at}; more data, augmentation, dropout or weight decay "
            "put it off.",
            {
                "tag": self._tag,
                "eval_loss": loss,
                "best_eval_loss": best,
                "best_step": float(at),
            },
            score=loss / best if best > 0 else 1.0,
            step=step,
        )
