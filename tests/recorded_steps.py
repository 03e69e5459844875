"""`Steps` made from arrays of values, as the recorder would have measured them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyvizllm.telemetry.records import STATISTICS, Floats, Kind, Steps


def statistics_of(values: Floats) -> Floats:
    """[12] the rows of STATISTICS, of one tensor; of None: that it was not measured."""
    numbers = np.asarray(values, dtype=np.float64).ravel()
    with np.errstate(invalid="ignore"):
        statistics = {
            "sum": numbers.sum(),
            "sum_squares": (numbers**2).sum(),
            "abs_sum": np.abs(numbers).sum(),
            "norm": np.sqrt((numbers**2).sum()),
            "min": numbers.min(initial=np.inf),
            "max": numbers.max(initial=-np.inf),
            "abs_max": np.abs(numbers).max(initial=0.0),
            "zeros": (numbers == 0).sum(),
            "nans": np.isnan(numbers).sum(),
            "pos_infs": np.isposinf(numbers).sum(),
            "neg_infs": np.isneginf(numbers).sum(),
            "numel": numbers.size,
        }
    return np.array([statistics[name] for name in STATISTICS], dtype=np.float64)


def steps_of(
    first: int,
    names: Sequence[str],
    values: Mapping[Kind, Sequence[Sequence[Any]]],
    **fields: Any,
) -> Steps:
    """`values[kind][step][parameter]` is an array, or None where it was not measured."""
    statistics: dict[Kind, Floats] = {}
    count = 0
    for kind, of_kind in values.items():
        count = len(of_kind)
        rows = [
            np.stack(
                [np.zeros(12) if value is None else statistics_of(value) for value in step], axis=1
            )
            for step in of_kind
        ]
        statistics[kind] = np.stack(rows)
    wall_times = fields.pop("wall_times", 1000.0 + np.arange(first, first + count, dtype=float))
    return Steps(first, tuple(names), statistics, np.asarray(wall_times), **fields)
