"""Line charts as SVG: no script, no font, no colour of their own but what the page's style says."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pyvizllm.telemetry.records import Floats

WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 30, 26
_BUCKETS = 240  # columns of a chart; each shows the least and the largest of its values
_COLOURS = 8  # that the page's style defines: --c0 to --c7
_MOST_LINES = 24
_MOST = 1e300  # the largest value that is drawn


@dataclass(frozen=True)
class Series:
    """A curve: `values` [N] at `steps` [N], rising."""

    steps: Floats
    values: Floats


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
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(steps)], strict=True):
        chosen |= {begin + int(values[begin:end].argmin()), begin + int(values[begin:end].argmax())}
    index = np.array(sorted(chosen))
    return Series(steps[index], values[index])


def line_chart(title: str, curves: Mapping[str, Series], *, log: bool = False) -> str:
    """One chart as an SVG element; empty where no curve has a finite value to show.

    Arguments:
        title: shown above the chart.
        curves: name -> curve; beyond 24 curves an even choice of 24 is drawn, as the title says.
        log: a logarithmic axis; values that are not positive are left out.
    """
    shown = {}
    for name, curve in curves.items():
        keep = curve.values > 0 if log else np.ones(len(curve.values), dtype=bool)
        # The distance between two of them has to be a number.
        finite = np.where(np.isfinite(curve.values), curve.values.clip(-_MOST, _MOST), np.nan)
        thin = thinned(Series(curve.steps[keep], finite[keep]))
        if len(thin.values):
            shown[name] = Series(thin.steps, np.log10(thin.values) if log else thin.values)
    if not shown:
        return ""
    if len(shown) > _MOST_LINES:
        names = list(shown)
        places = np.unique(np.linspace(0, len(names) - 1, _MOST_LINES).astype(int)).tolist()
        title = f"{title} ({len(places)} of {len(names)})"
        shown = {names[i]: shown[names[i]] for i in places}
    low_x = min(float(c.steps[0]) for c in shown.values())
    high_x = max(float(c.steps[-1]) for c in shown.values())
    low_y = min(float(c.values.min()) for c in shown.values())
    high_y = max(float(c.values.max()) for c in shown.values())
    largest = max(abs(low_y), abs(high_y))
    if high_y - low_y <= 1e-12 * largest or largest < 1 / _MOST:
        pad = 0.05 * largest if largest > 1 / _MOST else 0.5
        low_y, high_y = low_y - pad, high_y + pad
    axes = _Axes(low_x, max(high_x, low_x + 1), low_y, high_y)
    parts = [_grid(axes, log)]
    for number, (name, curve) in enumerate(shown.items()):
        parts.append(_line(axes, name, curve, number, len(shown)))
    label = html.escape(title, quote=True)
    legend = _legend(list(shown)) if 1 < len(shown) <= _COLOURS else ""
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<text x="{_LEFT}" y="17" class="title">{label}</text>{"".join(parts)}</svg>'
        f"{legend}</figure>"
    )


@dataclass(frozen=True)
class _Axes:
    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        share = (value - self.low_x) / (self.high_x - self.low_x)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low_y) / (self.high_y - self.low_y)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between the limits: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Logarithms of round numbers: powers of ten, 1, 2 and 5 times those, or evenly apart."""
    first, last = math.floor(low), math.ceil(high)
    apart = max(1, -(-(last - first) // most))
    factors = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [k + math.log10(factor) for k in range(first, last + 1, apart) for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high]
    least, largest = 10.0**low, 10.0**high
    if len(ticks) > 1:
        return ticks
    if largest - least <= max(1e-12 * largest, 1 / _MOST):  # too close, or too close to 0
        return _ticks(low, high, most)
    return [math.log10(tick) for tick in _ticks(least, largest, most)]


def _grid(axes: _Axes, log: bool) -> str:
    parts = []
    ticks = (_log_ticks if log else _ticks)(axes.low_y, axes.high_y, 5)
    texts = _labels([10.0**tick for tick in ticks] if log else ticks)
    for value, text in zip(ticks, texts, strict=True):
        y = axes.y(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="tick end">{text}</text>')
    ticks = _ticks(axes.low_x, axes.high_x, 4)
    for value, text in zip(ticks, _labels(ticks), strict=True):
        x = axes.x(value)
        place = "end" if x > WIDTH - 40 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" class="tick {place}">{text}</text>')
    return "".join(parts)


def _line(axes: _Axes, name: str, curve: Series, number: int, count: int) -> str:
    points = " ".join(
        f"{axes.x(x):.1f},{axes.y(y):.1f}"
        for x, y in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)  # numpy
    )
    if count <= _COLOURS:
        colour = f"var(--c{number})"
    else:  # layers: from the first to the last along the spectrum
        colour = f"hsl({260 - 220 * number / max(1, count - 1):.0f} 65% 52%)"
    label = f"<title>{html.escape(name)}</title>"
    if len(curve.steps) == 1:
        x, y = points.split(",")
        return f'<circle cx="{x}" cy="{y}" r="3" style="fill:{colour}">{label}</circle>'
    return f'<polyline points="{points}" class="line" style="stroke:{colour}">{label}</polyline>'


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background:var(--c{number})"></i>{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<figcaption class="legend">{items}</figcaption>'


def _labels(values: Sequence[float]) -> list[str]:
    """Texts of an axis's numbers, with as many digits as tell them from each other."""
    gap = min((high - low for low, high in pairwise(values)), default=math.inf)
    texts: list[str] = []
    for digits in range(1, 18):  # 17 tell any two floats apart
        texts = [_number(value, digits) for value in values]
        read = [float(text.replace(",", "")) for text in texts]
        if all(abs(r - value) <= 0.01 * gap for r, value in zip(read, values, strict=True)):
            break
    return texts


def _number(value: float, digits: int) -> str:
    """With at least so many digits, and without zeros at the end."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.{max(digits, 4 if abs(value) < 1000 else 5)}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"
