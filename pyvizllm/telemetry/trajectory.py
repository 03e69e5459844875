"""The path of all parameters through the training, seen through sketches of 64 numbers each."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pyvizllm.telemetry.assembler import MOVED, Draft
from pyvizllm.telemetry.groups import Layers
from pyvizllm.telemetry.heatmap import to_png
from pyvizllm.telemetry.records import Floats, Picture

FILE = "trajectory.npz"
PATH_TAG = "trajectory/path"
POINT_TAG = "trajectory/point"  # an array for JSONL: the sketch of all parameters together
START_TAG = "trajectory/start"  # likewise, once: the step before the first one, then its sketch
POINTS = 1024
"""At most so many points of the path are kept: every second one goes where there are more."""
SAVE_SECONDS = 5.0
"""The file of the path is written at most so often, and at the end."""
_REDRAW = 1.2  # the picture is drawn again when there are so many times more points

_logger = logging.getLogger("pyvizllm")
# Pixels. TensorBoard shows pictures some 330 pixels wide, in which this text is still read.
_WIDTH, _HEIGHT, _MARGIN, _HEAD = 640, 460, 40, 60
_TEXT = 19  # the size of the text
_INK, _PAPER, _LINE = (32, 32, 32), (255, 255, 255), (70, 104, 146)
_START, _END = (40, 140, 90), (200, 60, 50)


class Trajectory:
    """How far the parameters have come, and how straight.

    From the sketches (`pyvizllm.ops.sketch`) of each parameter at every publication: distances
    between sketches are those between parameters, with a standard deviation of 9 % for a single
    parameter and less for all together, whose errors are independent.

    - `trajectory/distance` from the start, `trajectory/path_length` along the way;
    - `trajectory/update_cosine` of the last two displacements from one publication to the next;
    - `moved/LAYER`: distance of a layer from the start / its norm at the start. Where the start is
      a pretrained model, these are the layers that the fine-tuning has moved.

    A parameter that begins to train later starts where it then is.

    Arguments:
        folder: of the run, which keeps the path in a file: a training that goes on from a later
            step of the same run goes on with its start and its path. None keeps nothing.
        layout: how the parameters are sharded (`layout_of`), which their sketches depend on; 0
            where none is. The path of another layout is none to go on with.
    """

    def __init__(self, folder: Path | None = None, layout: int = 0) -> None:
        self._file = None if folder is None else folder / FILE
        self._layout = layout
        self._saved = -math.inf  # when, by the monotonic clock
        self._warned = False
        self._names: tuple[str, ...] = ()
        self._layers = Layers.of(())
        self._start: Floats = np.empty((0, 64))  # [T, 64]; NaN of what has not begun to train
        self._last: Floats = np.empty((0, 64))  # likewise
        self._move: Floats | None = None  # the last displacement, [T, 64]
        self._length = 0.0
        self._path: list[Floats] = []  # each [64]
        self._steps: list[int] = []
        self._lengths: list[float] = []  # of the path up to each point
        self._stride, self._skipped = 1, 0
        self._published = False
        self._drawn, self._drawn_to = 0, -1  # the points of the picture, and its last step

    def publish(self, draft: Draft) -> None:
        """Take the draft's sketch and show how far the parameters have come."""
        if draft.sketch is None or np.isinf(draft.sketch).any():
            return
        if np.isnan(draft.sketch).all():  # other processes have seen where the parameters are
            return
        draft.scalars |= self.move(draft.step, draft.names, draft.sketch)
        draft.arrays[POINT_TAG] = _point(self._last).tolist()  # numpy
        if not self._published and len(self._path) > 1:
            draft.arrays[START_TAG] = [self._steps[0], *self._path[0].tolist()]  # numpy
        self._published = True
        if len(self._path) >= 3 and len(self._path) >= _REDRAW * self._drawn:
            self._draw(draft)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self._save()

    def finish(self, draft: Draft) -> None:
        """Save the path, and draw it if it is not shown up to its end."""
        if self._path:
            self._save()
        self._draw(draft)

    def _draw(self, draft: Draft) -> None:
        if len(self._path) >= 3 and self._steps[-1] != self._drawn_to:
            self._drawn, self._drawn_to = len(self._path), self._steps[-1]
            draft.images[PATH_TAG] = self.picture()

    def move(self, step: int, names: tuple[str, ...], sketch: Floats) -> dict[str, float]:
        """The parameters `names` are now at `sketch` [T, 64]; returns what there is to show.

        NaN: of a parameter that has not begun to train, or stays where it was.
        """
        begins = len(self._path) == 0
        if begins and step > 0 and self._restore(step, names):
            self._last = sketch  # what came after the checkpoint is forgotten
            return {}
        if names != self._names:
            self._set_names(names)
        self._begin(sketch)
        now = np.where(np.isnan(sketch), self._last, sketch)
        move, way = _difference(now, self._last), _difference(now, self._start)
        self._last = now
        length, distance = float(np.linalg.norm(move)), float(np.linalg.norm(way))
        self._length += length
        self._append(step, _point(now))
        if begins:
            return {}
        scalars = {"trajectory/path_length": self._length, "trajectory/distance": distance}
        before = 0.0 if self._move is None else float(np.linalg.norm(self._move))
        if self._move is not None and length > 0 and before > 0:
            cosine = float((move * self._move).sum()) / (length * before)
            scalars["trajectory/update_cosine"] = max(-1.0, min(1.0, cosine))
        self._move = move
        moved = self._layers.sum((way**2).sum(axis=1))
        norms = self._layers.sum(np.nansum(self._start**2, axis=1))
        for tag, distance, norm in zip(self._layers.tags, moved, norms, strict=True):
            if norm > 0:  # a bias begins at zero: no distance is far compared with nothing
                scalars[f"{MOVED}/{tag}"] = float(np.sqrt(distance / norm))
        return scalars

    def picture(self) -> Picture:
        """The path on its two principal axes."""
        return draw_path(np.array(self._path), self._steps)

    def _set_names(self, names: tuple[str, ...]) -> None:
        """Parameters are only added, at the end."""
        new = np.full((len(names) - len(self._names), self._start.shape[1]), np.nan)
        self._start = np.concatenate((self._start, new))
        self._last = np.concatenate((self._last, new))
        if self._move is not None:
            self._move = np.concatenate((self._move, np.zeros_like(new)))
        self._names, self._layers = names, Layers.of(names)

    def _begin(self, sketch: Floats) -> None:
        """Parameters that are seen for the first time start where they are now."""
        new = np.isnan(self._start) & ~np.isnan(sketch)
        self._start[new] = sketch[new]
        # The others' points lack these; shifted by where they start, nothing seems to jump.
        shift = np.where(new, sketch, 0.0).sum(axis=0)
        self._path = [point + shift for point in self._path]
        self._last = np.where(np.isnan(self._last), sketch, self._last)

    def _save(self) -> None:
        """Replace the file; one that cannot be written is told once, and the run goes on."""
        self._saved = time.monotonic()
        if self._file is None:
            return
        partial = self._file.with_name(f".{self._file.name}.{os.getpid()}-{id(self):x}.part")
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    names=np.array(self._names),
                    start=self._start,
                    path=np.array(self._path),
                    steps=np.array(self._steps),
                    lengths=np.array(self._lengths),
                    stride=np.array(self._stride),
                    layout=np.array(self._layout),
                )
            partial.replace(self._file)
        except OSError as error:
            if not self._warned:
                _logger.warning("trajectory: cannot write %s: %s", self._file, error)
            self._warned = True
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _restore(self, step: int, names: tuple[str, ...]) -> bool:
        """Take up what an earlier part of this run has left up to `step`, if it fits."""
        if self._file is None or not self._file.is_file():
            return False
        try:
            left = _read(self._file)
        except Exception as error:  # zipfile, zlib and NumPy each have their own
            _logger.warning("trajectory: begins anew, %s cannot be read: %r", self._file, error)
            return False
        kept = left["steps"] <= step
        if tuple(left["names"].tolist()) != names or not kept.any():  # numpy
            return False
        if int(left.get("layout", 0)) != self._layout:
            return False
        self._names, self._layers = names, Layers.of(names)
        self._start, self._stride = left["start"], int(left["stride"])
        self._path, self._steps = list(left["path"][kept]), left["steps"][kept].tolist()
        self._lengths = left["lengths"][kept].tolist()
        self._length = self._lengths[-1]
        return True

    def _append(self, step: int, point: Floats) -> None:
        """The newest point is always kept, older ones every 2nd, 4th, ... publication."""
        if self._skipped and self._path:
            for kept in (self._path, self._steps, self._lengths):
                kept.pop()
        self._path.append(point)
        self._steps.append(step)
        self._lengths.append(self._length)
        self._skipped = (self._skipped + 1) % self._stride
        if len(self._path) > POINTS:
            # The last one is the newest, whether its turn has come or not.
            keep = sorted({*range(0, len(self._path), 2), len(self._path) - 1})
            self._path = [self._path[i] for i in keep]
            self._steps = [self._steps[i] for i in keep]
            self._lengths = [self._lengths[i] for i in keep]
            self._stride, self._skipped = 2 * self._stride, 0


def _read(file: Path) -> dict[str, np.ndarray]:
    """What a trajectory has saved; raises whatever it likes where that is not what is there."""
    # Opened here: NumPy leaves what is no archive open.
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        left = {name: archive[name] for name in archive.files}
    parameters, points = len(left["names"]), len(left["steps"])
    expected = {
        "names": ("U", (parameters,)),
        "start": ("f", (parameters, 64)),
        "path": ("f", (points, 64)),
        "steps": ("i", (points,)),
        "lengths": ("f", (points,)),
        "stride": ("i", ()),
    }
    if any((left[name].dtype.kind, left[name].shape) != own for name, own in expected.items()):
        raise ValueError("its arrays are of other types or shapes")
    if left["stride"] < 1 or not np.isfinite(left["path"]).all():
        raise ValueError("its values are none of a path")
    return left


def _difference(now: Floats, before: Floats) -> Floats:
    """[T, 64]; 0 of what has not begun to train."""
    return np.where(np.isnan(before), 0.0, now - before)


def _point(sketch: Floats) -> Floats:
    """[64]: a sketch of all parameters together, as every one of them has signs of its own."""
    total: Floats = np.nansum(sketch, axis=0)
    return total


def principal_axes(path: Floats) -> tuple[Floats, Floats]:
    """[P, 64] points -> [P, 2] on the two axes of largest variance, and their shares of it [2]."""
    centred = path - path.mean(axis=0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    variance = spread**2
    shares = variance / variance.sum() if variance.sum() > 0 else variance
    return centred @ axes[:2].T, shares[:2]


class Plane(NamedTuple):
    """A path on its two principal axes."""

    places: Floats
    """[P, 2] rightwards and downwards within the frame; one scale for both: angles stay true."""
    shares: Floats
    """[2] of the variance; [1] where there are not two axes."""
    extent: float
    """The larger of its width and height, as a distance between parameters."""


def on_plane(path: Floats, frame: tuple[float, float, float, float]) -> Plane:
    """The path [P, 64] on its main plane, in the middle of a frame (left, top, right, bottom)."""
    points, shares = principal_axes(path)
    low, high = points.min(axis=0), points.max(axis=0)
    left, top, right, bottom = frame
    room = np.array([right - left, bottom - top])[: len(low)]
    extent = np.maximum(high - low, 1e-300)
    scaled = (points - (low + high) / 2) * (room / extent).min()
    places = np.array([left + right, top + bottom]) / 2 + scaled * np.array([1.0, -1.0])
    return Plane(places, shares, float(extent.max()))


def marks(points: int) -> list[int]:
    """Which points of a path have their step written beside them; the most important first."""
    evenly = np.unique(np.linspace(0, points - 1, 9).astype(int)).tolist()  # numpy
    return [evenly[-1], *evenly[:-1]]


def apart(boxes: Sequence[tuple[float, float, float, float]]) -> list[int]:
    """Which boxes (left, top, right, bottom) to show so that none overlaps one before it."""
    shown: list[int] = []
    for index, (left, top, right, bottom) in enumerate(boxes):
        others = [boxes[other] for other in shown]
        if all(right <= x0 or x1 <= left or bottom <= y0 or y1 <= top for x0, y0, x1, y1 in others):
            shown.append(index)
    return shown


def draw_path(path: Floats, steps: Sequence[int]) -> Picture:
    """The path [P, 64] through the parameters of `steps` [P], as a picture of its main plane."""
    frame = _MARGIN, _HEAD, _WIDTH - _MARGIN, _HEIGHT - _HEAD
    plane = on_plane(path, frame)
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=_TEXT)
    line = [(float(x), float(y)) for x, y in plane.places]
    draw.line(line, fill=_LINE, width=3, joint="curve")
    labels = []
    for index in reversed(marks(len(line))):  # the ends lie upon the others
        x, y = line[index]
        colour = _START if index == 0 else _END if index == len(line) - 1 else _LINE
        radius = 7 if index in (0, len(line) - 1) else 4
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        anchor = "ls" if x < _WIDTH - 130 else "rs"
        labels.append(((x + (9 if anchor == "ls" else -9), y - 6), str(steps[index]), anchor))
    labels.reverse()
    boxes = [draw.textbbox(place, text, font, anchor) for place, text, anchor in labels]
    for place, text, anchor in (labels[index] for index in apart(boxes)):
        draw.text(place, text, fill=_INK, font=font, anchor=anchor)
    title = f"Path of the parameters, steps {steps[0]} (green) to {steps[-1]} (red)"
    draw.text((_WIDTH / 2, 10), title, fill=_INK, font=font, anchor="ma")
    text = f"{shares_text(plane.shares)}; extent {plane.extent:.3g}"
    draw.text((_WIDTH / 2, _HEIGHT - 10), text, fill=_INK, font=font, anchor="md")
    return to_png(image)


def shares_text(shares: Floats) -> str:
    """How much of the path its main plane shows."""
    first, *second = (f"{100 * share:.0f} %" for share in shares)
    upwards = f", {second[0]} upwards" if second else ""
    return f"{first} of the variance across{upwards}"
