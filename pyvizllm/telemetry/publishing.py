"""What happens to a hand-over on the publisher's thread: it becomes Steps, then a Publication."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.histogram_counts import TakenCounts
from pyvizllm.telemetry.overhead import Cost, Overhead
from pyvizllm.telemetry.records import (
    KINDS,
    STATISTICS,
    Counts,
    Flags,
    Floats,
    Kind,
    Publication,
    Steps,
)
from pyvizllm.telemetry.step_buffer import GROUP_RATE, RATE, HandedOver, arranged, order_of
from pyvizllm.telemetry.wholes import Wholes

UNLESS_LOGGED = "pyvizllm/unless-logged/"
"""Before the tag of a setting that counts only where the loop does not log that tag."""

Histograms = Mapping[Kind, tuple[Counts, Floats]]


class Assembling(Protocol):
    """Turns steps into what is shown of them; called by the publisher's thread alone."""

    grad_stage: str

    def add(self, steps: Steps) -> None:
        """Take note of steps; their order is that of the training."""

    def publish(
        self,
        step: int,
        wall_time: float,
        histograms: Histograms,
        seconds: float | None = None,
        sketch: Floats | None = None,
    ) -> Publication:
        """All that is shown of the steps since the last publication, which took `seconds`."""

    def finish(self, step: int, wall_time: float) -> Publication | None:
        """What is still to be shown at the end of the run."""

    def start(self, step: int, names: tuple[str, ...], sketch: Floats) -> None:
        """Where the parameters are before their first step: NaN of those that have none yet."""


@dataclass
class Due:
    """A publication that goes with a hand-over."""

    step: int
    wall_time: float
    stage: str  # at which the gradients of its steps were measured
    cost: Cost
    counts: Mapping[Kind, Mapping[Block, TakenCounts]] = field(default_factory=dict)


class Publishing:
    """The publisher's thread's side of a Recorder.

    Arguments:
        make_assembler: called once with the names of the parameters, on the publisher's thread.
        overhead: shown with each publication.
        names: of all watched parameters.
        awaited: since when somebody waits for the publisher's thread, or None.
    """

    def __init__(
        self,
        make_assembler: Callable[[Sequence[str]], Assembling],
        overhead: Overhead,
        names: Sequence[str],
        awaited: Callable[[], float | None],
    ) -> None:
        self._make_assembler, self._overhead = make_assembler, overhead
        self._wholes = Wholes(names, awaited)
        self._assembler: Assembling | None = None
        self._moments = {kind: Moments() for kind in KINDS}
        self._logged: set[str] = set()  # tags that the loop has logged so far

    def handle(self, handed_over: HandedOver, due: Due | None) -> Publication | None:
        """Read a hand-over; the publication, where one is due."""
        if self._assembler is None:
            self._assembler = self._make_assembler(handed_over.names)
        if any(block.shards for block in handed_over.buffer.statistics):
            self._overhead.keep_intervals()
        self._wholes.complete(handed_over, due)
        start = handed_over.sketch("start")
        if start is not None:
            self._assembler.start(handed_over.buffer.first - 1, handed_over.names, start)
        for kind in handed_over.buffer.restarted:
            self._moments[kind] = Moments()
        if handed_over.buffer.row:
            steps = self._with_settings(handed_over.read())
            self._assembler.add(steps)
            for kind, moments in self._moments.items():
                moments.add(steps, kind, handed_over.buffer.counted[kind])
        if due is None:
            return None
        self._assembler.grad_stage = due.stage
        names = handed_over.names
        waiting = [place for place, name in enumerate(names) if name in handed_over.waiting]
        histograms = {
            kind: (
                _joined(counts, handed_over),
                self._moments[kind].take(len(names), waiting if kind == "grad" else []),
            )
            for kind, counts in due.counts.items()
        }
        publication = self._assembler.publish(
            due.step,
            due.wall_time,
            histograms,
            seconds=due.cost.wall,
            sketch=handed_over.sketch("sketch"),
        )
        scalars = {**publication.scalars, **self._overhead.scalars(due.cost)}
        return replace(publication, scalars=scalars)

    def finish(self, step: int) -> Publication | None:
        """What is still to be shown at the end of the run, whose last step this is."""
        return None if self._assembler is None else self._assembler.finish(step, time.time())

    def _with_settings(self, steps: Steps) -> Steps:
        """Steps with the settings that telemetry has seen, but for those that the loop logs."""
        seen = {tag for tag in steps.scalars if tag.startswith(UNLESS_LOGGED)}
        self._logged |= steps.scalars.keys() - seen
        tags = {tag: tag.removeprefix(UNLESS_LOGGED) for tag in steps.scalars}
        hidden = {t for t in seen if tags[t] in self._logged or _is_of_first_group(t, steps)}
        kept = [tag for tag in steps.scalars if tag not in hidden]
        return replace(
            steps,
            scalars={tags[tag]: steps.scalars[tag] for tag in kept},
            logged={tags[tag]: steps.logged[tag] for tag in kept},
        )


def _is_of_first_group(tag: str, steps: Steps) -> bool:
    """Whether `tag` is a learning rate that is the first group's, though it is of another.

    Here and not where it is noted: it may be a tensor, and those are not read there.
    """
    first = UNLESS_LOGGED + RATE
    if first not in steps.scalars or not tag.startswith(UNLESS_LOGGED + GROUP_RATE.format("")):
        return False
    where = steps.logged[tag]
    return np.allclose(steps.scalars[tag][where], steps.scalars[first][where], atol=0)


class Moments:
    """Minimum, maximum, sum and sum of squares of the values that histograms have counted."""

    def __init__(self) -> None:
        self._moments = np.empty((0, 4))

    def add(self, steps: Steps, kind: Kind, counted: Flags) -> None:
        """Add those steps that were counted."""
        counted = counted[: len(steps)]  # a step that is given up may have been counted, too
        if kind not in steps.statistics or not counted.any():
            return
        self._grow(len(steps.names))
        statistics = steps.statistics[kind][counted]
        columns = (statistics[:, STATISTICS.index(name)] for name in _MOMENTS)
        low, high, total, squares = columns
        measured = statistics[:, STATISTICS.index("numel")] > 0
        mine = self._moments.T
        # NumPy's minimum and maximum of a NaN are NaN: then the bins must tell the finite ones.
        mine[0] = np.minimum(mine[0], np.where(measured, low, np.inf).min(0))
        mine[1] = np.maximum(mine[1], np.where(measured, high, -np.inf).max(0))
        mine[2] += np.where(measured, total, 0.0).sum(0)
        mine[3] += np.where(measured, squares, 0.0).sum(0)

    def take(self, rows: int, kept: Sequence[int] = ()) -> Floats:
        """[rows, 4] since the last take; NaN as the extremes where nothing was counted.

        Rows that are `kept` go on, as their counts are not shown yet.
        """
        self._grow(rows)
        taken, self._moments = self._moments, np.empty((0, 4))
        if kept:
            self._grow(rows)
            self._moments[kept] = taken[kept]
        taken[taken[:, 0] > taken[:, 1], :2] = np.nan
        return taken

    def _grow(self, rows: int) -> None:
        new = np.tile((np.inf, -np.inf, 0.0, 0.0), (rows - len(self._moments), 1))
        self._moments = np.concatenate((self._moments, new))


_MOMENTS = ("min", "max", "sum", "sum_squares")


def _joined(counts: Mapping[Block, TakenCounts], handed_over: HandedOver) -> Counts:
    """[T, 4096] in the order of the names: the counts themselves where they are in that order."""
    parts = [taken.read() for taken in counts.values()]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    names, left_out = handed_over.names, handed_over.absent | handed_over.uncounted
    shown = [[None if n in left_out else n for n in block.names] for block in counts]
    places, rows = order_of(shown, names)
    return arranged(joined, places, rows, len(names), axis=0)
