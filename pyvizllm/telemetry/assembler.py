"""From steps to what is shown of them: the work of the publisher's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from pyvizllm.telemetry.dashboard import LAYOUT
from pyvizllm.telemetry.descriptions import STAGE_TAG
from pyvizllm.telemetry.groups import Layers
from pyvizllm.telemetry.interval_sums import LoggedSums, ParameterSums
from pyvizllm.telemetry.records import (
    KINDS,
    Counts,
    Finding,
    Floats,
    HistogramTable,
    Kind,
    Picture,
    Publication,
    Steps,
)

MAX_TAGS = 2000  # that TensorBoard gets of parameters, unless another number is asked for
NOTICE_TAG = "pyvizllm/notice"
_CURVES = ("grad_norm", "param_norm", "update_ratio")  # scalars of each parameter
_LAYER_CURVES = ("layer_grad_norm", "layer_update_ratio")  # and of each layer
MOVED = "moved"  # likewise, by what follows the parameters' path
_logger = logging.getLogger("pyvizllm")


@dataclass
class Draft:
    """A publication in the making: parts of the engine add to it what they have to show."""

    step: int
    wall_time: float
    names: tuple[str, ...] = ()  # [T]
    sketch: Floats | None = None  # [T, 64] of the parameters after the step
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: list[HistogramTable] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    images: dict[str, Picture] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    arrays: dict[str, Sequence[float]] = field(default_factory=dict)


class Part(Protocol):
    """Something that looks at the steps and has more to show; called by one thread."""

    def add(self, steps: Steps) -> None:
        """Take note of steps, in their order."""

    def publish(self, draft: Draft) -> None:
        """Add what there is to show by now."""


@runtime_checkable
class Drawing(Protocol):
    """A part, or a path, with a picture that is not drawn at every publication."""

    def finish(self, draft: Draft) -> None:
        """The run ends: draw, and save, what has changed since that was done."""


class Path(Protocol):
    """What follows the parameters from publication to publication."""

    def move(self, step: int, names: tuple[str, ...], sketch: Floats) -> Mapping[str, float]:
        """The parameters are now at `sketch`."""

    def publish(self, draft: Draft) -> None:
        """The parameters are now at the draft's sketch; add what there is to show."""


class Assembler:
    """Sums over the steps of an interval, and their histograms, by tag.

    Arguments:
        names: of the T parameters at the beginning; more may come.
        histograms: the kinds that are shown.
        max_tags: the most tags that TensorBoard gets of parameters: beyond it a histogram is that
            of a layer, and so are, if that is not enough, the scalars; if that is not enough
            either, only some of the layers are shown, evenly apart.
        trajectory: follows the parameters' sketches; None for no trajectory.
        parts: what else looks at the steps; asked in this order at each publication. One that
            raises is logged once and asked no more, and so is the trajectory.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        histograms: Sequence[Kind] = KINDS,
        max_tags: int = MAX_TAGS,
        trajectory: Path | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        self.grad_stage = ""
        self._kinds, self._max_tags = tuple(histograms), max_tags
        self._parts, self._trajectory = list(parts), trajectory
        self._failed: set[int] = set()  # ids of parts
        self._shown_stage = self._notice = ""
        self._shown_layout = False
        self._sums = ParameterSums.empty((), Layers.of(()))
        self._set_names(tuple(names))
        self._logged = LoggedSums()
        self._since: float | None = None  # the time of the last step that was published
        self._until = 0.0

    def add(self, steps: Steps) -> None:
        """Take note of steps, in their order."""
        if steps.names != self._names:
            self._set_names(steps.names)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are shown as they are
            self._sums.add(steps)
            self._logged.add(steps)
        if len(steps):
            self._until = float(steps.wall_times[-1])
            if self._since is None:
                self._since = float(steps.wall_times[0])
        for part in self._parts:
            self._guarded(part, part.add, steps)

    def start(self, step: int, names: tuple[str, ...], sketch: Floats) -> None:
        """The parameters `names` before the first step after `step`, as a sketch [T, 64]."""
        if self._trajectory is not None and not np.isinf(sketch).any():
            self._guarded(self._trajectory, self._trajectory.move, step, names, sketch)

    def publish(
        self,
        step: int,
        wall_time: float,
        histograms: Mapping[Kind, tuple[Counts, Floats]],
        seconds: float | None = None,
        sketch: Floats | None = None,
    ) -> Publication:
        """All that is to be shown of the steps since the last publication.

        Arguments:
            step, wall_time: of the publication.
            histograms: counts [T, 4096] and moments [T, 4] of each kind.
            seconds: how long the interval took, without pauses; None for the time between the
                last steps of this publication and of the one before.
            sketch: [T, 64] of the parameters after the step, for the parts.
        """
        draft = Draft(step, wall_time, self._names, sketch)
        if seconds is None and self._since is not None:
            seconds = self._until - self._since
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            draft.scalars |= _gradient_scalars(self._sums)
            draft.scalars |= self._parameter_scalars()
            for tag, value in self._logged.scalars(seconds).items():
                draft.scalars[_apart(tag) if tag in draft.scalars else tag] = value
            draft.histograms += self._tables(histograms)
        self._say_stage(draft)
        if self._trajectory is not None:
            self._guarded(self._trajectory, self._trajectory.publish, draft)
        for tag in self._hidden:
            draft.scalars.pop(tag, None)
        for part in self._parts:
            self._guarded(part, part.publish, draft)
        self._sums, self._logged = ParameterSums.empty(self._names, self._layers), LoggedSums()
        self._since = self._until
        layout = None if self._shown_layout else LAYOUT
        self._shown_layout = True
        return Publication(
            step=draft.step,
            wall_time=draft.wall_time,
            scalars=draft.scalars,
            histograms=draft.histograms,
            texts=draft.texts,
            images=draft.images,
            findings=draft.findings,
            arrays=draft.arrays,
            layout=layout,
        )

    def finish(self, step: int, wall_time: float) -> Publication | None:
        """The pictures as they are at the end of the run; None where they are shown already."""
        draft = Draft(step, wall_time, self._names)
        everyone: list[object] = [self._trajectory, *self._parts]
        for part in everyone:
            if isinstance(part, Drawing):
                self._guarded(part, part.finish, draft)
        return Publication(step, wall_time, images=draft.images) if draft.images else None

    def _guarded(self, part: object, action: Callable[..., object], *arguments: object) -> None:
        """Run a part's own code; if it raises, say so once and go on without that part."""
        if id(part) in self._failed:
            return
        try:
            action(*arguments)
        except Exception:
            self._failed.add(id(part))
            name = type(part).__name__
            _logger.warning("watch: %s failed and is switched off", name, exc_info=True)

    def _set_names(self, names: tuple[str, ...]) -> None:
        """Take note of more parameters; what the old ones did in the interval stays with them."""
        known = self._sums
        self._names, self._layers = names, Layers.of(names)
        self._sums = ParameterSums.empty(names, self._layers)
        self._carry_over(known)
        count, of_layer = len(self._layers.names), list(_LAYER_CURVES)
        of_layer += [] if self._trajectory is None else [MOVED]
        curves, layers = len(_CURVES) * len(names), len(of_layer) * count
        axes = 2 * len(self._kinds)
        self._by_parameter = curves + layers + axes * len(names) <= self._max_tags
        self._curves = curves + layers + axes * count <= self._max_tags
        most = count if self._curves else self._max_tags // (len(of_layer) + axes)
        self._shown = np.zeros(count, dtype=np.bool_)  # [L]
        self._shown[np.linspace(0, count - 1, min(most, count)).astype(int)] = True
        self._hidden = {
            f"{tag}/{self._layers.tags[i]}"
            for i in np.flatnonzero(~self._shown)
            for tag in of_layer
        }
        self._tags = {tag: tuple(f"{tag}/{name}" for name in names) for tag in (*_CURVES, *KINDS)}
        self._layer_tags = {
            tag: tuple(f"{tag}/{layer}" for layer in self._layers.tags)
            for tag in (*KINDS, *_LAYER_CURVES)
        }

    def _carry_over(self, known: ParameterSums) -> None:
        """Names are only added, at the end: the sums of the old ones keep their places."""
        count = len(known.param_norm)
        self._sums.param_norm[:count] = known.param_norm
        self._sums.param_measured[:count] = known.param_measured
        groups = {layer: i for i, layer in enumerate(self._layers.names)}
        places = np.array([groups[layer] for layer in known.layers.names], dtype=np.int64)
        for mean, old, where in (
            (self._sums.grad_norm, known.grad_norm, slice(count)),
            (self._sums.update_ratio, known.update_ratio, slice(count)),
            (self._sums.layer_grad_norm, known.layer_grad_norm, places),
            (self._sums.layer_update_ratio, known.layer_update_ratio, places),
        ):
            mean.total[where], mean.count[where] = old.total, old.count
        self._sums.total_norms = known.total_norms
        self._sums.nans, self._sums.infs = known.nans, known.infs
        self._sums.zeros, self._sums.elements = known.zeros, known.elements

    def _parameter_scalars(self) -> dict[str, float]:
        sums = self._sums
        scalars = sums.layer_grad_norm.items(self._layer_tags["layer_grad_norm"])
        scalars |= sums.layer_update_ratio.items(self._layer_tags["layer_update_ratio"])
        if self._curves:
            scalars |= sums.grad_norm.items(self._tags["grad_norm"])
            scalars |= sums.update_ratio.items(self._tags["update_ratio"])
            tags, norms = self._tags["param_norm"], sums.param_norm.tolist()  # numpy
            scalars |= {tags[i]: norms[i] for i in np.flatnonzero(sums.param_measured).tolist()}
        return scalars

    def _tables(self, histograms: Mapping[Kind, tuple[Counts, Floats]]) -> list[HistogramTable]:
        tables = []
        for kind in self._kinds:
            if kind not in histograms:
                continue
            counts, moments = histograms[kind]
            tags, chosen = self._tags[kind], np.ones(len(counts), dtype=np.bool_)
            if not self._by_parameter:
                counts, moments = _of_layers(self._layers, counts, moments)
                tags, chosen = self._layer_tags[kind], self._shown
            shown = np.flatnonzero(counts.any(axis=1) & chosen)
            if len(shown) == len(tags):
                tables.append(HistogramTable(tags, counts, moments))
            elif len(shown):
                some = tuple(tags[i] for i in shown.tolist())
                tables.append(HistogramTable(some, counts[shown], moments[shown]))
        return tables

    def _say_stage(self, draft: Draft) -> None:
        """Texts that hold until the next of their kind."""
        if self.grad_stage and self.grad_stage != self._shown_stage:
            self._shown_stage = draft.texts[STAGE_TAG] = self.grad_stage
        notice = ""
        if not self._by_parameter:
            what = "histograms are" if self._curves else "histograms and scalars are"
            layers, shown = len(self._shown), int(self._shown.sum())
            some = f"{layers}" if shown == layers else f"{shown} of {layers}"
            notice = (
                f"{len(self._names)} parameters would have more than max_tags={self._max_tags} "
                f"tags: {what} of {some} layers, all parameters of a layer "
                "together. include=, exclude=, histograms= or a larger max_tags= show more."
            )
        if notice != self._notice:
            self._notice = notice
            if notice:
                draft.texts[NOTICE_TAG] = notice
                _logger.info("watch: %s", notice)


def _of_layers(layers: Layers, counts: Counts, moments: Floats) -> tuple[Counts, Floats]:
    """[T, 4096] and [T, 4] -> [L, 4096] and [L, 4]: histograms add."""
    if not layers.names:
        return counts[:0], moments[:0]
    counts = np.add.reduceat(counts[layers.order], layers.starts, axis=0)
    moments = moments[layers.order]
    low = np.fmin.reduceat(moments[:, 0], layers.starts)  # NaN: no finite value in that parameter
    high = np.fmax.reduceat(moments[:, 1], layers.starts)
    sums = np.add.reduceat(moments[:, 2:], layers.starts, axis=0)
    return counts, np.column_stack((low, high, sums))


def _apart(tag: str) -> str:
    """Where a loop's own value of what is measured is shown: train/grad_norm may be after clipping,
    that which torch's clipping returns is before it."""
    group, _, name = tag.partition("/")
    return f"{group}/logged_{name}"


def _gradient_scalars(sums: ParameterSums) -> dict[str, float]:
    norms = np.concatenate(sums.total_norms) if sums.total_norms else np.empty(0)
    if len(norms) == 0:
        return {}
    return {
        "train/grad_norm": float(norms.mean()),
        "train/grad_norm_max": float(norms.max()),
        "health/nans": sums.nans,
        "health/infs": sums.infs,
        "health/zeros": sums.zeros / sums.elements,
    }
