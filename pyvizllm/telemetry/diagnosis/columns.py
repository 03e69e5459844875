"""Arithmetic over steps and parameters that several rules share."""

from __future__ import annotations

import numpy as np

from pyvizllm.telemetry.records import Counts, Floats


def median(values: Floats) -> Floats:
    """Medians of the columns [n, ...] -> [...] without their NaNs; NaN where nothing is left."""
    ordered = np.sort(values, axis=0)  # NaNs come last
    count = (~np.isnan(ordered)).sum(0)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(ordered) - 1)
    middle = (
        np.take_along_axis(ordered, low[None], 0)[0] + np.take_along_axis(ordered, high[None], 0)[0]
    )
    return np.where(count > 0, middle / 2, np.nan)


def measured(values: Floats) -> Counts:
    """[T]: how many of the rows [n, T] are not NaN."""
    return (~np.isnan(values)).sum(0)
