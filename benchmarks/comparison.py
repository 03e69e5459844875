"""Ours against what a user would otherwise run, round by round in one process."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Function = Callable[[], object]
Clock = Callable[[Function], float]
"""Calls a function once and returns the milliseconds it took."""


@dataclass
class Comparison:
    """Ours against one other way, medians over rounds in which both ran, one after the other."""

    case: str
    ours: str
    other: str
    ours_ms: float
    other_ms: float
    ratio: float  # the median over rounds of other's time / ours
    ratio_low: float  # quartiles over rounds
    ratio_high: float
    rounds: int
    target: str  # what the project asks of itself, or ""
    gb_per_s: float | None = None  # bytes that have to move / our time, GPU only
    limit: str = ""  # what gb_per_s is held against: "copy" or "read"
    fraction_of_limit: float | None = None


@dataclass(frozen=True)
class Traffic:
    """The bytes a case cannot do without, and the bandwidth it is held against."""

    bytes: int
    limit: str  # "copy" or "read"
    limit_gb_per_s: float

    def gb_per_s(self, milliseconds: float) -> float:
        return self.bytes / milliseconds / 1e6

    def fraction(self, milliseconds: float) -> float:
        return self.gb_per_s(milliseconds) / self.limit_gb_per_s


def measure(
    clock: Clock, functions: Mapping[str, Function], rounds: int, before: Function = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of every function, [rounds] each, after two calls to warm up.

    `before` is called before each call, and not timed.
    """
    for function in functions.values():
        for _ in range(2):
            before()
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    for _ in range(rounds):  # in turn, so that a drift of the machine meets all of them
        for name, function in functions.items():
            before()
            times[name].append(clock(function))
    return times


def summarise(
    case: str,
    ours: str,
    times: Mapping[str, list[float]],
    target: Mapping[str, str],
    traffic: Traffic | None = None,
) -> list[Comparison]:
    """One comparison for each way that is not ours."""
    milliseconds = statistics.median(times[ours])
    comparisons = []
    for other in times:
        if other == ours:
            continue
        ratios = [b / a for a, b in zip(times[ours], times[other], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        comparison = Comparison(
            case=case,
            ours=ours,
            other=other,
            ours_ms=milliseconds,
            other_ms=statistics.median(times[other]),
            ratio=statistics.median(ratios),
            ratio_low=low,
            ratio_high=high,
            rounds=len(ratios),
            target=target.get(other, ""),
        )
        if traffic is not None:
            comparison.gb_per_s = traffic.gb_per_s(milliseconds)
            comparison.limit = traffic.limit
            comparison.fraction_of_limit = traffic.fraction(milliseconds)
        comparisons.append(comparison)
    return comparisons
