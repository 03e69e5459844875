"""The axes of a chart: where a value is drawn, and round numbers beside the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 26
MOST = 1e300  # the largest value that is drawn
_MOST_WHOLE = 1e7  # steps, beyond which their numbers would touch


@dataclass(frozen=True)
class Axes:
    """Steps from `low_x` to `high_x`, values (logarithms of them) from `low_y` to `high_y`."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        share = (value - self.low_x) / (self.high_x - self.low_x)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low_y) / (self.high_y - self.low_y)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def step_grid(self) -> str:
        """Numbers of steps below the chart."""
        parts = []
        ticks = _ticks(self.low_x, self.high_x, 4, least=1.0)  # there are no half steps
        whole = [f"{tick:,.0f}" for tick in ticks]
        texts = whole if self.high_x < _MOST_WHOLE else number_texts(ticks)
        for value, text in zip(ticks, texts, strict=True):
            x = self.x(value)
            place = "end" if x > WIDTH - 40 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" class="tick {place}">{text}</text>')
        return "".join(parts)

    def value_grid(self, log: bool) -> str:
        """Lines across the chart, and their values on its left."""
        parts = []
        ticks = (_log_ticks if log else _ticks)(self.low_y, self.high_y, 6)
        texts = number_texts([10.0**tick for tick in ticks] if log else ticks)
        for value, text in zip(ticks, texts, strict=True):
            y = self.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick end">{text}</text>')
        return "".join(parts)


def value_range(
    low: float, high: float, *, log: bool, limits: tuple[float, float] | None
) -> tuple[float, float]:
    """The ends of the axis of values from `low` to `high`, which may be the same.

    A constant is shown within its limits; without them between 0 and twice itself, or within one
    power of ten on a logarithmic axis.
    """
    largest = max(abs(low), abs(high))
    if high - low > 1e-12 * largest and largest > 1 / MOST:
        return low, high
    if log:
        return low - 0.5, high + 0.5
    if limits is not None:
        return min(low, limits[0]), max(high, limits[1])
    if largest <= 1 / MOST:
        return 0.0, 1.0
    return min(0.0, 2 * low), max(0.0, 2 * high)


def _ticks(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """Round numbers between the ends: 1, 2 or 5 times a power of ten, not below `least`, apart."""
    rough = max((high - low) / most, least)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Logarithms of round numbers: powers of ten, 1, 2 and 5 times those, or evenly apart."""
    first, last = math.floor(low), math.ceil(high)
    apart = max(1, -(-(last - first) // most))
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [k + math.log10(factor) for k in range(first, last + 1, apart) for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high]
    least, largest = 10.0**low, 10.0**high
    if len(ticks) > 1:
        return ticks
    if largest - least <= max(1e-12 * largest, 1 / MOST):  # too close, or too close to 0
        return _ticks(low, high, most)
    return [math.log10(tick) for tick in _ticks(least, largest, most)]


def number_texts(values: Sequence[float]) -> list[str]:
    """Texts of an axis's numbers, with as many digits as tell them from each other."""
    gap = min((high - low for low, high in pairwise(values)), default=math.inf)
    sizes = [abs(value) for value in values if value != 0]
    plain = [1e-3 <= abs(value) < 1e5 for value in values]
    if sizes and max(sizes) < 100 * min(sizes):  # of one size, all are written in one way
        plain = [min(sizes) >= 1e-4 and 1e-3 <= max(sizes) < 1e5] * len(values)
    texts: list[str] = []
    for digits in range(1, 18):  # 17 tell any two floats apart
        texts = [_number(value, digits, p) for value, p in zip(values, plain, strict=True)]
        read = [float(text.replace(",", "")) for text in texts]
        if all(abs(r - value) <= 0.01 * gap for r, value in zip(read, values, strict=True)):
            break
    return texts


def _number(value: float, digits: int, plain: bool) -> str:
    """With at least so many digits, and without zeros at the end."""
    if value == 0:
        return "0"
    if plain:
        return f"{value:,.{max(digits, 4 if abs(value) < 1000 else 5)}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"
