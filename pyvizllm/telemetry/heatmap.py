"""A picture of all layers at all steps: log10 of the gradient norm, layers down, steps across."""

from __future__ import annotations

import io
import time

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pyvizllm.telemetry.assembler import Draft
from pyvizllm.telemetry.groups import Layers
from pyvizllm.telemetry.records import Floats, Picture, Steps

TAG = "heatmap/grad_norm"
COLUMNS = 512
"""At most so many columns; then neighbours become one, which shows the larger norm of the two."""
REFRESH_SECONDS = 30.0

# Pixels. TensorBoard shows pictures some 330 pixels wide, in which this text is still read.
_WIDTH, _LABELS, _RIGHT = 512, 200, 10  # of the map, beside it left and right
_TITLE, _FOOT, _HEIGHT = 36, 64, 640  # above the map, below it, and of it at most
_TEXT, _CHARACTERS = 19, 18  # the size of the text, and as many as fit beside the map
_LARGEST = 308.0  # whose power of ten is a number
_INK, _PAPER = (32, 32, 32), (255, 255, 255)
MISSING = (225, 225, 225)
NOT_FINITE = (230, 30, 160)  # NaN and Inf: no colour of the map
# Dark to bright, rising evenly in lightness, so that it also reads in grey.
_ANCHORS = np.array(
    [
        *((12, 8, 38), (34, 16, 84), (58, 26, 112), (72, 46, 130), (70, 74, 142), (58, 104, 146)),
        *((44, 132, 144), (42, 158, 132), (82, 182, 108), (142, 202, 80), (204, 216, 72)),
        (250, 232, 120),
    ],
    dtype=np.float64,
)


class HeatMap:
    """Keeps every layer's gradient norm at every step, thinned, and draws it now and then.

    One column is one step until there are more than 512; from then on one column is 2, 4, 8, ...
    steps and shows the largest norm of them, so that a spike is never thinned away. NaN and Inf
    have a colour of their own.
    """

    def __init__(self) -> None:
        self._layers = Layers.of(())
        self._names: tuple[str, ...] = ()
        self._columns: Floats = np.empty((0, 0))  # [columns, L]; NaN: NaN or Inf; -1: no gradient
        self._stride, self._filled = 1, 0  # steps of a column, and those in the last one
        self._first: int | None = None  # the number of the first step
        self._drawn, self._stale = -np.inf, False  # when, and whether there is more by now

    def add(self, steps: Steps) -> None:
        """Take note of steps, in their order."""
        if "grad" not in steps.statistics or not steps.names:
            return
        if steps.names != self._names:
            self._set_names(steps.names)
        if self._first is None:
            self._first = steps.first
        measured = steps.statistic("grad", "numel") > 0
        squares = np.where(measured, steps.statistic("grad", "sum_squares"), 0.0)
        norms = np.sqrt(self._layers.sum(squares))
        norms[~np.isfinite(norms)] = np.nan
        norms[self._layers.sum(measured.astype(np.float64)) == 0] = -1.0
        for row in norms:
            self._append(row)
        self._stale = True

    def publish(self, draft: Draft) -> None:
        """Draw the map, if it has not been drawn for half a minute."""
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self.finish(draft)

    def finish(self, draft: Draft) -> None:
        """Draw the map, if it is not shown as it is."""
        if self._stale:
            self._drawn, self._stale = time.monotonic(), False
            draft.images[TAG] = self.picture()

    def picture(self) -> Picture:
        """The map as it is now."""
        return draw_norms(self._columns, self._layers.tags, self._axis())

    def _axis(self) -> tuple[str, str]:
        first = self._first or 0
        last = first + (len(self._columns) - 1) * self._stride + self._filled - 1
        return f"step {first}", f"{last}"

    def _set_names(self, names: tuple[str, ...]) -> None:
        old, self._names = self._layers, names
        self._layers = Layers.of(names)
        columns = np.full((len(self._columns), len(self._layers.names)), -1.0)
        places = {layer: i for i, layer in enumerate(self._layers.names)}
        for i, layer in enumerate(old.names):
            if layer in places:
                columns[:, places[layer]] = self._columns[:, i]
        self._columns = columns

    def _append(self, norms: Floats) -> None:
        if len(self._columns) and self._filled < self._stride:
            # np.maximum keeps NaN: a step that was not finite is never thinned away.
            self._columns[-1] = np.maximum(self._columns[-1], norms)
            self._filled += 1
            return
        self._columns = np.concatenate((self._columns, norms[None]))
        self._filled = 1
        if len(self._columns) > COLUMNS:
            pairs = self._columns[: COLUMNS // 2 * 2].reshape(-1, 2, len(norms)).max(axis=1)
            self._columns = np.concatenate((pairs, self._columns[-1:]))
            self._stride *= 2


def colours(shares: Floats) -> NDArray[np.uint8]:
    """[...] in 0..1, or NaN, to [..., 3]."""
    places = np.nan_to_num(shares) * (len(_ANCHORS) - 1)
    grid = np.arange(len(_ANCHORS))
    channels = [np.interp(places, grid, _ANCHORS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def draw_norms(norms: Floats, labels: tuple[str, ...], axis: tuple[str, str]) -> Picture:
    """A map of norms [columns, L]: NaN for what is not finite, -1 for what was not measured.

    `labels` [L] are those of the rows; `axis` says which steps are at its two ends.
    """
    pixels, limits = paint_norms(norms)
    return _draw(pixels, labels, axis, limits)


def paint_norms(norms: Floats) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """[columns, L] as for `draw_norms` to pixels [L, columns, 3], and the scale's ends in log10."""
    shown = norms.T
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.where(shown > 0, shown, np.nan))
    finite = logs[np.isfinite(logs)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    high = max(high, low + 1e-3)
    pixels = colours((logs - low) / (high - low))
    pixels[np.isnan(shown)] = NOT_FINITE
    pixels[shown <= 0] = MISSING  # no gradient, or one that is exactly zero
    return pixels, (low, high)


def enlarge(pixels: NDArray[np.uint8], width: int) -> Image.Image:
    """`pixels` [L, columns, 3] as a picture of `width` pixels across, and 4 to 24 a layer."""
    row_height = max(4, min(24, _HEIGHT // len(pixels)))
    size = width, len(pixels) * row_height
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def _draw(
    pixels: NDArray[np.uint8],
    labels: tuple[str, ...],
    axis: tuple[str, str],
    limits: tuple[float, float],
) -> Picture:
    """`pixels` [L, columns, 3] with its labels, the steps of its ends and the scale."""
    grown = enlarge(pixels, _WIDTH)
    bottom = _TITLE + grown.height
    picture = Image.new("RGB", (_LABELS + _WIDTH + _RIGHT, bottom + _FOOT), _PAPER)
    picture.paste(grown, (_LABELS, _TITLE))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=_TEXT)
    draw.text((_LABELS, 8), "Gradient norm by layer", fill=_INK, font=font, anchor="la")

    row_height = grown.height // len(pixels)
    every = -(-(_TEXT + 1) // row_height)
    for row in range(0, len(pixels), every):
        y = _TITLE + row * row_height + row_height / 2
        label = labels[row]
        if len(label) > _CHARACTERS:
            label = f"…{label[1 - _CHARACTERS :]}"
        draw.text((_LABELS - 6, y), label, fill=_INK, font=font, anchor="rm")
    draw.text((_LABELS, bottom + 6), axis[0], fill=_INK, font=font, anchor="la")
    draw.text((_LABELS + _WIDTH, bottom + 6), axis[1], fill=_INK, font=font, anchor="ra")
    missing, broken = ((pixels == key).all(axis=-1) for key in (MISSING, NOT_FINITE))
    scale = np.linspace(0, 1, 120)
    low, high = (f"{10.0 ** min(limit, _LARGEST):.2g}" for limit in limits)
    keys = [
        (low, colours(scale), f"{high} (log scale)", not (missing | broken).all()),
        ("", np.full((14, 3), NOT_FINITE, np.uint8), "NaN or Inf", broken.any()),
        ("", np.full((14, 3), MISSING, np.uint8), "none or zero", missing.any()),
    ]
    x, y = 10.0, bottom + 34
    for before, bar, after, shown in keys:
        if not shown:
            continue
        draw.text((x, y), before, fill=_INK, font=font, anchor="la")
        x += draw.textlength(before, font=font) + 8
        picture.paste(Image.fromarray(bar[None]).resize((len(bar), 14)), (int(x), y + 4))
        x += len(bar) + 6
        draw.text((x, y), after, fill=_INK, font=font, anchor="la")
        x += draw.textlength(after, font=font) + 16
    return to_png(picture)


def to_png(picture: Image.Image) -> Picture:
    """The picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=3)
    return Picture(buffer.getvalue(), picture.width, picture.height)
