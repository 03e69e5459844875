"""16-bit trouble: gradients that underflow, updates that round to nothing, steps skipped."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.columns import measured, median
from pyvizllm.telemetry.diagnosis.ratios import LEAST_UPDATES
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom, some

WINDOW = 64
LEAST = 20  # measured steps before anything is said
FLOAT16_QUANTUM = 2.0**-24  # every float16 is a multiple of its smallest subnormal number


class GradientUnderflow:
    """Most of a weight's gradient is exactly zero, and the rest is a few float16 quanta.

    Whatever passed through float16 is a multiple of 2**-24; where the largest element of a
    gradient is at most 64 of these, and always a whole number of them, what is below half a
    quantum became zero (Micikevicius et al., 2018, section 3.2, who scale the loss for it). A
    gradient that never was float16 has 24 significant bits and fails the test.
    """

    name: ClassVar[str] = "float16_underflow"
    lasting: ClassVar[bool] = True
    QUANTA = 64
    ZEROS = 0.5

    def look(self, run: Run) -> Symptom | None:
        history = run.history
        largest = history.statistic("grad", "abs_max", WINDOW) / FLOAT16_QUANTUM
        zeros = history.statistic("grad", "zeros", WINDOW)
        share = median(zeros / history.statistic("grad", "numel", WINDOW))
        whole = np.isnan(largest) | ((largest == np.floor(largest)) & (largest <= self.QUANTA))
        alive = (largest > 0).sum(0) >= LEAST
        # All zero at times is how it ends; all zero always is a dead parameter.
        bad = run.columns.matrices & alive & whole.all(0) & (np.nan_to_num(share) >= self.ZEROS)
        if not bad.any():
            return None
        worst = float(share[bad].max())
        return Symptom(
            "serious" if bad.sum() >= 0.5 * run.columns.matrices.sum() else "warning",
            f"gradients underflow in float16: up to {100 * worst:.0f} % of the elements of "
            f"{some(history.names, bad)} are zero and the largest is at most {self.QUANTA} times "
            f"float16's smallest number ({bad.sum()} parameters)",
            "Scale the loss (torch.amp.GradScaler), or use bfloat16, which has float32's range.",
            {"zeros": worst, "parameters": float(bad.sum())},
            score=float(bad.sum()),
        )


class LostUpdates:
    """More than half of the elements of 16-bit weights that have a gradient do not change.

    bfloat16 keeps 8 significant bits: a change of less than 1/512 of a weight rounds to nothing,
    and a learning rate that is right in float32 does nothing (Zamirai et al., 2020, "Revisiting
    BFloat16 training"). Where it begins as the learning rate decays, it is only noted.
    """

    name: ClassVar[str] = "lost_updates"
    lasting: ClassVar[bool] = True
    SHARE, SERIOUS = 0.5, 0.9

    def __init__(self) -> None:
        self._least = 1.0

    def look(self, run: Run) -> Symptom | None:
        history = run.history
        names = history.names
        low = run.columns.matrices & run.columns.sixteen_bit
        if not low.any():
            return None
        for rows, least in ((WINDOW, LEAST), (None, LEAST_UPDATES)):  # None: measured rarely
            unchanged = history.statistic("update", "zeros", rows)[:, low]
            zeros = np.nan_to_num(history.statistic("grad", "zeros", rows)[:, low])
            numel = history.statistic("grad", "numel", rows)[:, low]
            lost = np.maximum(unchanged - zeros, 0.0) / (numel - zeros)
            if int(measured(lost).max()) >= least:
                break
        else:
            return None
        share = float(np.nanmedian(median(lost)))
        self._least = min(self._least, share)
        if not share > self.SHARE or run.warming_up(WINDOW):
            return None
        decayed = self._least < self.SHARE / 2
        severity = "serious" if share >= self.SERIOUS else "warning"
        return Symptom(
            "info" if decayed else severity,  # type: ignore[arg-type]
            f"{100 * share:.0f} % of the weights that have a gradient do not change in a step: "
            f"updates are smaller than 16 bits resolve ({some(names, low)})",
            "Keep float32 weights: bfloat16 autocast over float32 parameters, or "
            "pyvizllm.AdamW(master_weights=True).",
            {"share": share, "parameters": float(low.sum())},
            score=share,
        )


class SkippedSteps:
    """More than half of the last 32 steps were skipped for gradients that were not finite.

    GradScaler starts at 2**16 and halves, so up to about 20 skipped steps at the start are its
    search for a scale, more in a row are none; later it skips one in 2,000 (PyTorch's
    growth_interval).
    """

    name: ClassVar[str] = "skipped_steps"
    lasting: ClassVar[bool] = True
    WINDOW = 32
    SEARCH = 20
    HOPELESS = SEARCH + 4  # in a row
    SHARE = 0.5

    def look(self, run: Run) -> Symptom | None:
        skipped = run.history.skipped(self.HOPELESS)
        if len(skipped) < self.HOPELESS or not skipped.all():
            skipped = run.history.skipped(self.WINDOW)
            if len(run.history) < self.WINDOW + self.SEARCH:
                return None
        share = float(skipped.mean())
        if not share > self.SHARE:
            return None
        return Symptom(
            "serious",
            f"{skipped.sum()} of the last {len(skipped)} optimizer steps were skipped, because "
            "gradients were not finite",
            "If the loss is finite, its scale is too large or the model overflows float16: use "
            "bfloat16. If it is NaN, the model produces it: see where it came first.",
            {"share": share},
            score=share,
        )
