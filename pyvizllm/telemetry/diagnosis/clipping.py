"""Clipping that has become a part of every step."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.rule import Run, Symptom

STEPS = 200
SHARE = 0.95


class ConstantClipping:
    """Nearly every one of 200 steps is clipped, to less than half of the usual norm.

    Pascanu, Mikolov and Bengio (2013, section 3.2) clip at 0.5 to 10 times the average norm: then
    clipping is for outliers. Below that the limit sets the length of every step, and the learning
    rate means something else, which many a healthy training bears: it is only noted up to ten
    times below. Gradients measured after somebody else's clipping show it as a norm
    that is the same at every step, to 1e-3; by how much they were clipped is then unknown.
    """

    name: ClassVar[str] = "constant_clipping"
    lasting: ClassVar[bool] = True
    AVERAGE, WARNING = 2.0, 10.0  # average norm over the limit
    SAME = 1e-3

    def look(self, run: Run) -> Symptom | None:
        if len(run.history) < STEPS:
            return None
        norms = run.history.total_norm("grad", STEPS)
        limits = run.history.clipped(STEPS)
        known = np.isfinite(norms) & (norms > 0)
        if known.sum() < SHARE * STEPS:
            return None
        if np.isnan(limits).all():
            return self._measured_after(norms[known])
        ratio = (norms / limits)[known & (limits > 0)]
        share = float((ratio > 1).sum() / STEPS)
        average = float(ratio.mean()) if len(ratio) else 0.0
        if share < SHARE or average <= self.AVERAGE:
            return None
        limit = float(np.nanmax(limits))
        return Symptom(
            "warning" if average >= self.WARNING else "info",
            f"{100 * share:.0f} % of the last {STEPS} steps were clipped: the gradients' norm is "
            f"{average:.1f} times max_norm = {limit:g} on average",
            f"Raise max_norm to about {2 * average * limit:.2g}, so that it cuts outliers only, "
            "and lower the learning rate if that makes the loss unsteady.",
            {"share": share, "norm_over_limit": average, "max_norm": limit},
            score=average,
        )

    def _measured_after(self, norms: np.ndarray) -> Symptom | None:
        limit = float(np.median(norms))
        share = float((np.abs(norms - limit) <= self.SAME * limit).sum() / STEPS)
        if share < SHARE:
            return None
        return Symptom(
            "info",
            f"the gradients' norm was {limit:.4g} in {100 * share:.0f} % of the last {STEPS} "
            "steps: they were clipped before they were measured, nearly every time",
            "Raise the clipping's max_norm, or clip with pyvizllm.clip_grad_norm_, which shows the "
            "norm from before.",
            {"share": share, "norm": limit},
        )
