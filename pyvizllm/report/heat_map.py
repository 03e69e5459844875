"""The map of layers by steps: pixels in a picture, everything to be read as text of the page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import numpy as np

from pyvizllm.report.axes import number_texts
from pyvizllm.telemetry.heatmap import (
    MISSING,
    NOT_FINITE,
    colours,
    enlarge,
    paint_norms,
    to_png,
)
from pyvizllm.telemetry.records import Floats

_TITLE = "Gradient norm by layer over the steps"
_WIDTH = 1024  # pixels of the picture, which the page stretches
_LINE = 15  # pixels that a name needs
_LARGEST = 308.0  # whose power of ten is a number


def heat_map(norms: Floats, names: Sequence[str], ends: tuple[str, str]) -> str:
    """A map of norms [columns, L]: NaN for what is not finite, -1 for what was not measured.

    The picture is as wide as the page; names, steps and scale have the size of text on any.

    Arguments:
        norms: [columns, L]; NaN for what is not finite, -1 for what was not measured.
        names: [L], those of the rows.
        ends: the steps of the first and the last column.
    """
    pixels, limits = paint_norms(norms)
    picture = enlarge(pixels, _WIDTH)
    data = base64.b64encode(to_png(picture).png).decode()
    row_height = picture.height // len(pixels)
    every = -(-_LINE // row_height)
    labels = "".join(
        f'<span style="line-height:{row_height * every}px">'
        f"<bdi>{html.escape(names[row])}</bdi></span>"
        for row in range(0, len(names) - every + 1, every)
    )
    steps = f"<span>step {html.escape(ends[0])}</span><span>{html.escape(ends[1])}</span>"
    keys = [] if not (norms > 0).any() else [_scale(limits)]
    if np.isnan(norms).any():
        keys.append(f'<span><i style="background:{_css(NOT_FINITE)}"></i>NaN or Inf</span>')
    if (norms <= 0).any():
        keys.append(f'<span><i style="background:{_css(MISSING)}"></i>none or zero</span>')
    return (
        f'<figure class="map"><h3>{_TITLE}</h3><div class="rows"><div class="names">{labels}</div>'
        f'<img src="data:image/png;base64,{data}" alt="{_TITLE}" '
        f'style="height:{picture.height}px"><div class="steps">{steps}</div></div>'
        f'<figcaption class="legend">{"".join(keys)}</figcaption></figure>'
    )


def _scale(limits: tuple[float, float]) -> str:
    """The colours from the smallest norm to the largest, which are logarithms."""
    low, high = number_texts([10.0 ** min(limit, _LARGEST) for limit in limits])
    stops = ",".join(_css(colour) for colour in colours(np.linspace(0, 1, 12)).tolist())  # numpy
    bar = f'<b style="background:linear-gradient(90deg,{stops})"></b>'
    return f'<span class="scale">{low} {bar} {high}, log scale</span>'


def _css(colour: Sequence[int]) -> str:
    return f"rgb({','.join(map(str, colour))})"
