"""Line charts as SVG: no script, no font, no colour of their own but what the page's style says."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pyvizllm.report.axes import BOTTOM, HEIGHT, LEFT, MOST, TOP, WIDTH, Axes, value_range
from pyvizllm.telemetry.records import Floats

_BUCKETS = 240  # columns of a chart; each shows the least and the largest of its values
_COLOURS = 8  # that the page's style defines: --c0 to --c7
_MOST_LINES = 24
_BAND = 3.0  # the least width of a band, so that one publication of many is seen


@dataclass(frozen=True)
class Series:
    """A curve: `values` [N] at `steps` [N], rising."""

    steps: Floats
    values: Floats
    of_moments: bool = False
    """Whether a value is that of its step, and not of all steps since the one before."""


def thinned(series: Series, buckets: int = _BUCKETS) -> Series:
    """At most two points a bucket of steps: the least and the largest finite value, in order."""
    keep = np.isfinite(series.values)
    steps, values = series.steps[keep], series.values[keep]
    if len(steps) <= 2 * buckets:
        return Series(steps, values)
    span = steps[-1] - steps[0]
    places = np.minimum(((steps - steps[0]) / span * buckets).astype(int), buckets - 1)
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    chosen: set[int] = set()
    begins = starts.tolist()  # numpy
    for begin, end in zip(begins, [*begins[1:], len(steps)], strict=True):
        chosen |= {begin + int(values[begin:end].argmin()), begin + int(values[begin:end].argmax())}
    index = np.array(sorted(chosen))
    return Series(steps[index], values[index])


def line_chart(
    title: str,
    curves: Mapping[str, Series],
    *,
    log: bool = False,
    steps: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """One chart as an SVG element; empty where there is nothing to show.

    Where a curve is NaN or infinite it is interrupted, and a red band takes its place.

    Arguments:
        title: shown above the chart.
        curves: name -> curve; beyond 24 curves an even choice of 24 is drawn, as the title says.
        log: a logarithmic axis; values that are not positive are left out.
        steps: the ends of the axis of steps; None for those of the curves.
        limits: between which the values can be, for the axis of a constant.
    """
    broken = {name: c for name, c in curves.items() if not np.isfinite(c.values).all()}
    shown = {name: c for name, c in _drawn(curves, log).items() if len(c.values)}
    if not shown and not broken:
        return ""
    if steps is None:
        known = [*shown.values(), *broken.values()]
        steps = min(float(c.steps[0]) for c in known), max(float(c.steps[-1]) for c in known)
    if len(shown) > _MOST_LINES:
        names = list(shown)
        places = np.unique(np.linspace(0, len(names) - 1, _MOST_LINES).astype(int)).tolist()
        title = f"{title} ({len(places)} of {len(names)})"
        shown = {names[i]: shown[names[i]] for i in places}
    low = min((float(c.values.min()) for c in shown.values()), default=0.0)
    high = max((float(c.values.max()) for c in shown.values()), default=0.0)
    ends = value_range(low, high, log=log, limits=limits)
    axes = Axes(steps[0], max(steps[1], steps[0] + 1), *ends)
    parts = [_bands(axes, broken), axes.value_grid(log) if shown else "", axes.step_grid()]
    for number, (name, curve) in enumerate(shown.items()):
        breaks = _not_finite(broken[name]) if name in broken else np.empty(0)
        parts.append(_line(axes, name, curve, breaks, number, len(shown)))
    label = html.escape(title, quote=True)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<text x="{LEFT}" y="17" class="title">{label}</text>{"".join(parts)}</svg>'
        f"{_legend(list(shown), list(broken), len(curves), log)}</figure>"
    )


def _drawn(curves: Mapping[str, Series], log: bool) -> dict[str, Series]:
    """What is drawn of each curve."""
    drawn = {}
    for name, curve in curves.items():
        keep = curve.values > 0 if log else np.ones(len(curve.values), dtype=bool)
        # The distance between two of them has to be a number.
        finite = np.where(np.isfinite(curve.values), curve.values.clip(-MOST, MOST), np.nan)
        thin = thinned(Series(curve.steps[keep], finite[keep]))
        drawn[name] = Series(thin.steps, np.log10(thin.values) if log else thin.values)
    return drawn


def _not_finite(curve: Series) -> Floats:
    steps: Floats = curve.steps[~np.isfinite(curve.values)]
    return steps


def _gaps(curve: Series, start: float) -> list[tuple[float, float]]:
    """Where a curve is not finite."""
    broken = ~np.isfinite(curve.values)
    change = np.diff(broken.astype(int), prepend=0, append=0)
    before = np.concatenate(([start], curve.steps))
    firsts = curve.steps if curve.of_moments else before
    begins, ends = firsts[np.flatnonzero(change == 1)], before[np.flatnonzero(change == -1)]
    return list(zip(begins.tolist(), ends.tolist(), strict=True))  # numpy


def _bands(axes: Axes, broken: Mapping[str, Series]) -> str:
    gaps = [gap for curve in broken.values() for gap in _gaps(curve, axes.low_x)]
    bands: list[tuple[float, float]] = []
    for left, right in sorted((axes.x(begin), axes.x(end)) for begin, end in gaps):
        left = max(LEFT, min(left, right - _BAND))
        right = max(right, left + _BAND)
        if bands and left <= bands[-1][1] + 1:
            left, right = bands[-1][0], max(right, bands.pop()[1])
        bands.append((left, right))
    return "".join(
        f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}" class="broken"/>'
        for left, right in bands
    )


def _line(axes: Axes, name: str, curve: Series, breaks: Floats, number: int, count: int) -> str:
    """A curve, interrupted where one of the steps `breaks` is between two of its points."""
    if count <= _COLOURS:
        colour = f"var(--c{number})"
    else:  # layers: from the first to the last along the spectrum
        colour = f"hsl({260 - 220 * number / max(1, count - 1):.0f} 65% 52%)"
    label = f"<title>{html.escape(name)}</title>"
    points = [
        f"{axes.x(x):.1f},{axes.y(y):.1f}"
        for x, y in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)  # numpy
    ]
    cuts = np.flatnonzero(np.diff(np.searchsorted(breaks, curve.steps))) + 1
    parts = []
    for begin, end in pairwise([0, *cuts.tolist(), len(points)]):
        if end - begin == 1:
            x, y = points[begin].split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:{colour}">{label}</circle>')
            continue
        piece = " ".join(points[begin:end])
        parts.append(
            f'<polyline points="{piece}" class="line" style="stroke:{colour}">{label}</polyline>'
        )
    return "".join(parts)


def _legend(names: Sequence[str], broken: Sequence[str], count: int, log: bool) -> str:
    """The colours of `names`, which of all `count` curves are not finite somewhere, the scale."""
    items = [
        f'<span><i style="background:var(--c{number})"></i>{html.escape(name)}</span>'
        for number, name in enumerate(names)
        if count > 1 and len(names) <= _COLOURS
    ]
    if broken:
        some = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        which = f": {html.escape(some)}" if len(broken) < count else ""
        items.append(f'<span><i class="broken"></i>NaN or Inf{which}</span>')
    if log and names:
        items.append("<span>log scale</span>")
    return f'<figcaption class="legend">{"".join(items)}</figcaption>' if items else ""
