"""How large the updates are beside the weights."""

from __future__ import annotations

import numpy as np

from pyvizllm.telemetry.diagnosis.columns import measured, median
from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import Flags, Floats

WINDOW = 64
LEAST_UPDATES = 3
"""Snapshots of other optimizers' updates come once a publication."""


class UpdateRatios:
    """The median update-to-weight ratio over the weight matrices, step by step.

    Norm layers, biases and embeddings are left out (their scale says nothing), and so are tensors
    that were initialised at zero: their first update is all they consist of. In each step only
    those count that had a gradient: an expert that got no token is not moved.

    `latest` [n] is that of the last steps with an update, None where there are too few; `travelled`
    is the sum over all steps: 1 when the weights have gone as far as they are long.
    """

    def __init__(self) -> None:
        self.latest: Floats | None = None
        self.travelled = 0.0
        self._began_at_zero: dict[str, bool] = {}

    def add(self, history: History, matrices: Flags, rows: int) -> None:
        """Take in the last `rows` steps of the history."""
        self._judge_new(history)
        self.latest = self._ratios(history, matrices)
        if self.latest is not None:  # what was not measured was as the rest
            self.travelled += rows * float(self.latest[-rows:].mean())

    def _ratios(self, history: History, matrices: Flags) -> Floats | None:
        zero = [self._began_at_zero.get(name, False) for name in history.names]
        chosen = matrices & ~np.array(zero, np.bool_)
        for rows in (WINDOW, None):  # None: updates are measured rarely
            update = history.statistic("update", "norm", rows)[:, chosen]
            weight = history.statistic("param", "norm", rows)[:, chosen]
            ratio = update / weight
            learns = history.statistic("grad", "abs_max", rows)[:, chosen] > 0  # NaN: it had none
            ratio[~np.isfinite(ratio) | ~learns] = np.nan
            ratio = ratio[~np.isnan(ratio).all(1)][-WINDOW:]
            if len(ratio) >= LEAST_UPDATES:
                per_step: Floats = median(ratio.T)
                return per_step
        return None

    def _judge_new(self, history: History) -> None:
        """Look at the first update of each parameter that has had none so far."""
        names = history.names
        if len(self._began_at_zero) == len(names):
            return
        update = history.statistic("update", "norm")
        weight = history.statistic("param", "norm")
        first, columns = np.argmax(~np.isnan(update), 0), np.arange(len(names))
        # After a first step from zero, the update is all that is there. One that overwhelms the
        # weights comes near to that, but not to five digits.
        rest = np.abs(weight[first, columns] - update[first, columns])
        zero = ~(rest > 1e-5 * update[first, columns])
        for column in np.flatnonzero(measured(update) > 0):
            self._began_at_zero.setdefault(names[int(column)], bool(zero[column]))
