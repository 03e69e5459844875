"""The last steps of everything that is recorded per step, on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from pyvizllm.telemetry.records import STATISTICS, Counts, Flags, Floats, Kind, Steps

NEGATIVE_LOG_LIKELIHOOD = 2  # column of CrossEntropyMetrics.sums
METRICS = 53


class History:
    """The last `limit` steps, as they were handed over; appending one costs no copy.

    Rows are steps, oldest first; columns are the parameters of `names`, those of the newest
    chunk. Every method takes the last `last` rows only (None: all). Kept are `limit` rows of
    T x 12 x 8 bytes a kind, and at most one chunk more.

    Arguments:
        limit: how many steps to keep, at least 1.

    Raises:
        ValueError: for a limit below 1.

    Example:
        >>> history = History()
        >>> history.append(steps)
        >>> history.statistic("grad", "norm", last=10)  # [10, T]
    """

    def __init__(self, limit: int = 256) -> None:
        if limit < 1:
            raise ValueError(f"History: expected limit of at least 1, got {limit}")
        self.limit = limit
        self.names: tuple[str, ...] = ()
        self._chunks: deque[Steps] = deque()
        self._rows = 0

    def __len__(self) -> int:
        return min(self._rows, self.limit)

    @property
    def chunks(self) -> tuple[Steps, ...]:
        """What is kept, as handed over; the oldest chunk may reach back further than `limit`."""
        return tuple(self._chunks)

    def append(self, steps: Steps) -> None:
        """Add the steps that follow; those that are out of reach are forgotten."""
        if len(steps) == 0:
            return
        self._chunks.append(steps)
        self._rows += len(steps)
        self.names = steps.names
        while self._rows - len(self._chunks[0]) >= self.limit:
            self._rows -= len(self._chunks.popleft())

    def numbers(self, last: int | None = None) -> Counts:
        """[n] int64: the number of each step."""
        return self._gather(last, lambda steps: steps.first + np.arange(len(steps)))

    def wall_times(self, last: int | None = None) -> Floats:
        """[n] seconds since 1970, at the end of each step."""
        return self._gather(last, lambda steps: steps.wall_times)

    def table(self, kind: Kind, last: int | None = None) -> Floats:
        """[n, 12, T]: all of STATISTICS as they came; NaN in columns that did not exist yet."""
        shape = len(STATISTICS), len(self.names)

        def part(steps: Steps) -> Floats:
            if kind not in steps.statistics:
                return np.full((len(steps), *shape), np.nan)
            return self._in_columns(steps.names, steps.statistics[kind])

        return self._gather(last, part)

    def statistic(self, kind: Kind, name: str, last: int | None = None) -> Floats:
        """[n, T]: a row of STATISTICS; NaN where it was not measured and where a step was skipped.

        Gradients of a skipped step are not finite, and its update says nothing about the optimizer.
        """
        row = STATISTICS.index(name)
        numel = STATISTICS.index("numel")

        def part(steps: Steps) -> Floats:
            if kind not in steps.statistics:
                return np.full((len(steps), len(self.names)), np.nan)
            table = steps.statistics[kind]
            values = np.where(table[:, numel] > 0, table[:, row], np.nan)
            if steps.skipped is not None:
                values[steps.skipped] = np.nan
            return self._in_columns(steps.names, values)

        return self._gather(last, part)

    def total_norm(self, kind: Kind, last: int | None = None) -> Floats:
        """[n]: Euclidean norm over all measured parameters; NaN where none was."""
        squares = self.statistic(kind, "sum_squares", last)
        measured = ~np.isnan(squares)
        total = np.sqrt(np.where(measured, squares, 0.0).sum(1))
        return np.where(measured.any(1), total, np.nan)

    def scalar(self, tag: str, last: int | None = None) -> Floats:
        """[n]: what was logged under `tag` in each step; NaN where nothing was."""

        def part(steps: Steps) -> Floats:
            values = steps.scalars.get(tag)
            if values is None:
                return np.full(len(steps), np.nan)
            logged = steps.logged.get(tag)
            return values if logged is None else np.where(logged, values, np.nan)

        return self._gather(last, part)

    def metrics(self, last: int | None = None) -> Floats:
        """[n, 53]: CrossEntropyMetrics.sums; NaN where there are none."""

        def part(steps: Steps) -> Floats:
            return (
                np.full((len(steps), METRICS), np.nan) if steps.metrics is None else steps.metrics
            )

        return self._gather(last, part)

    def loss(self, last: int | None = None) -> Floats:
        """[n]: the loss of each step: the one logged as train/loss, else that of the metrics, else
        the mean over the micro-batches; NaN where there is none."""
        return self._gather(last, step_losses)

    def learning_rate(self, last: int | None = None) -> Floats:
        """[n]: what was logged as train/learning_rate or train/lr."""
        rate = self.scalar("train/learning_rate", last)
        return np.where(np.isnan(rate), self.scalar("train/lr", last), rate)

    def skipped(self, last: int | None = None) -> Flags:
        """[n]: whether the optimizer skipped the step."""

        def part(steps: Steps) -> Flags:
            return np.zeros(len(steps), np.bool_) if steps.skipped is None else steps.skipped

        return self._gather(last, part)

    def clipped(self, last: int | None = None) -> Floats:
        """[n]: the norm that pyvizllm's own clipping clips to; NaN where it did not run."""

        def part(steps: Steps) -> Floats:
            return np.full(len(steps), np.nan) if steps.clipped is None else steps.clipped

        return self._gather(last, part)

    def _in_columns(self, names: tuple[str, ...], values: Floats) -> Floats:
        """Values [..., len(names)] of an older chunk in today's columns."""
        if names is self.names or names == self.names:
            return values
        known = {name: column for column, name in enumerate(names)}
        columns = np.array([known.get(name, -1) for name in self.names], np.int64)
        return np.where(columns >= 0, values[..., columns], np.nan)

    def _gather(self, last: int | None, part: Callable[[Steps], np.ndarray]) -> np.ndarray:
        """The parts of the newest chunks, cut to the rows asked for."""
        rows = len(self) if last is None else min(last, len(self))
        parts: list[np.ndarray] = []
        found = 0
        for steps in reversed(self._chunks):
            if found >= rows:
                break
            parts.append(part(steps))
            found += len(steps)
        if not parts:
            raise ValueError("History: expected at least one step, got none")
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts[::-1])
        return whole[len(whole) - rows :]


def step_losses(steps: Steps) -> Floats:
    """[n]: the loss of each step, as `History.loss` says."""
    loss = np.full(len(steps), np.nan)
    if steps.micro_batches is not None:
        losses = steps.micro_batches.losses
        counted = steps.micro_batches.seen & ~np.isnan(losses)
        total = np.where(counted, losses, 0.0).sum(1)
        with np.errstate(invalid="ignore"):
            loss = np.where(counted.any(1), total / np.maximum(counted.sum(1), 1), np.nan)
    if steps.metrics is not None:
        tokens, total = steps.metrics[:, 0], steps.metrics[:, NEGATIVE_LOG_LIKELIHOOD]
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = np.where(tokens > 0, total / tokens, loss)
    if "train/loss" in steps.scalars:
        own = steps.scalars["train/loss"]
        logged = steps.logged.get("train/loss", np.ones(len(steps), np.bool_))
        loss = np.where(logged, own, loss)
    return loss
