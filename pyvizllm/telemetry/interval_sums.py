"""Sums over the steps between two publications, on the publisher's thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyvizllm.telemetry.groups import Layers
from pyvizllm.telemetry.records import Counts, Flags, Floats, Kind, Steps

_SETTINGS = ("learning_rate",)  # shown as in the last step: a mean of settings is none of them


@dataclass
class Mean:
    """Means over the measured steps of [T] numbers that may be missing in some."""

    total: Floats
    count: Counts

    @classmethod
    def empty(cls, length: int) -> Mean:
        """Of `length` numbers, none of them measured yet."""
        return cls(np.zeros(length), np.zeros(length, dtype=np.int64))

    def add(self, values: Floats, measured: Flags) -> None:
        """Add [n, T] values of n steps, those that were measured."""
        self.total += np.where(measured, values, 0.0).sum(0)
        self.count += measured.sum(0)

    def items(self, tags: tuple[str, ...]) -> dict[str, float]:
        """The means of those numbers that were measured, by their tags [T]."""
        shown = np.flatnonzero(self.count)
        means = (self.total[shown] / self.count[shown]).tolist()  # numpy: not a sync point
        return dict(zip([tags[i] for i in shown.tolist()], means, strict=True))


@dataclass
class ParameterSums:
    """What T parameters did in the steps of an interval; L layers."""

    layers: Layers
    grad_norm: Mean
    layer_grad_norm: Mean
    update_ratio: Mean
    layer_update_ratio: Mean
    param_norm: Floats  # [T] after the last measured step, NaN before
    param_measured: Flags  # [T]
    total_norms: list[Floats] = field(default_factory=list)  # of all gradients, of each step
    nans: float = 0.0
    infs: float = 0.0
    zeros: float = 0.0
    elements: float = 0.0

    @classmethod
    def empty(cls, names: tuple[str, ...], layers: Layers) -> ParameterSums:
        """Of the parameters `names` [T]."""
        count, groups = len(names), len(layers.names)
        return cls(
            layers,
            Mean.empty(count),
            Mean.empty(groups),
            Mean.empty(count),
            Mean.empty(groups),
            np.full(count, np.nan),
            np.zeros(count, dtype=np.bool_),
        )

    def add(self, steps: Steps) -> None:
        """Add steps over the same parameters."""
        if "grad" in steps.statistics:
            self._add_gradients(steps)
        if "param" in steps.statistics:
            self._add_parameters(steps)
        if "param" in steps.statistics and "update" in steps.statistics:
            self._add_updates(steps)

    def _add_gradients(self, steps: Steps) -> None:
        measured = _measured(steps, "grad")
        self.grad_norm.add(steps.statistic("grad", "norm"), measured)
        squares = np.where(measured, steps.statistic("grad", "sum_squares"), 0.0)
        of_layers = self.layers.sum(squares)
        self.layer_grad_norm.add(np.sqrt(of_layers), self._any(measured))
        stepped = measured.any(axis=1)
        self.total_norms.append(np.sqrt(of_layers.sum(axis=1))[stepped])

        def count(name: str) -> float:
            return float(steps.statistic("grad", name)[measured].sum())

        self.nans += count("nans")
        self.infs += count("pos_infs") + count("neg_infs")
        self.zeros += count("zeros")
        self.elements += count("numel")

    def _add_parameters(self, steps: Steps) -> None:
        measured = _measured(steps, "param")
        norms = steps.statistic("param", "norm")
        last = len(steps) - 1 - measured[::-1].argmax(axis=0)  # meaningless where there is none
        seen = measured.any(axis=0)
        self.param_norm = np.where(seen, norms[last, np.arange(len(last))], self.param_norm)
        self.param_measured |= seen

    def _add_updates(self, steps: Steps) -> None:
        measured = _measured(steps, "update") & _measured(steps, "param")
        update, param = (
            np.where(measured, steps.statistic(kind, "sum_squares"), 0.0)
            for kind in ("update", "param")
        )
        with np.errstate(divide="ignore", invalid="ignore"):  # of a parameter that is all zeros
            self.update_ratio.add(np.sqrt(update / param), measured & (param != 0))
            update, param = self.layers.sum(update), self.layers.sum(param)
            self.layer_update_ratio.add(np.sqrt(update / param), self._any(measured) & (param != 0))

    def _any(self, measured: Flags) -> Flags:
        """[n, T] -> [n, L]: layers of which something was measured."""
        return self.layers.sum(measured.astype(np.float64)) > 0


@dataclass
class LoggedSums:
    """What was logged in the steps of an interval, and the loss metrics of its tokens."""

    steps: int = 0
    totals: dict[str, tuple[float, int]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    metrics: Floats | None = None  # [53] CrossEntropyMetrics.sums
    skipped: int | None = None
    clipped: int = 0
    clipping: int = 0  # steps with such a limit, and a norm

    def add(self, steps: Steps) -> None:
        """Add what was logged of `steps`."""
        self.steps += len(steps)
        for tag, values in steps.scalars.items():
            some = values[steps.logged[tag]]
            if len(some):
                total, count = self.totals.get(tag, (0.0, 0))
                self.totals[tag] = total + float(some.sum()), count + len(some)
                self.last[tag] = float(some[-1])
        if steps.metrics is not None:
            sums = steps.metrics.sum(axis=0)
            self.metrics = sums if self.metrics is None else self.metrics + sums
        if steps.skipped is not None:
            self.skipped = (self.skipped or 0) + int(steps.skipped.sum())
        if steps.clipped is not None and "grad" in steps.statistics:
            measured = _measured(steps, "grad")
            squares = np.where(measured, steps.statistic("grad", "sum_squares"), 0)
            norms = np.sqrt(squares.sum(axis=1))
            # A norm that is NaN is neither above the limit nor below: gradients end as NaN.
            limited = ~np.isnan(steps.clipped) & measured.any(axis=1) & ~np.isnan(norms)
            self.clipped += int((limited & (norms > steps.clipped)).sum())
            self.clipping += int(limited.sum())

    def scalars(self, seconds: float | None) -> dict[str, float]:
        """What is shown of it; `seconds` that the steps took, if a rate is to be shown."""
        scalars: dict[str, float] = {}
        if seconds and self.steps and self.metrics is None:  # else tokens tell it
            scalars["train/steps_per_second"] = self.steps / seconds
        if self.metrics is not None:
            # NaN where no target counted.
            tokens = self.metrics[0]
            correct, loss, entropy = (self.metrics[1:4] / tokens).tolist()  # numpy
            total, count = self.totals.get("train/loss", (loss, 1))  # as in History.loss
            mean = total / count
            scalars |= {"train/loss": mean, "train/perplexity": float(np.exp(mean))}
            scalars |= {"train/accuracy": correct, "train/entropy": entropy}
            if seconds:
                scalars["train/tokens_per_second"] = float(tokens) / seconds
        for tag, (total, count) in self.totals.items():
            setting = any(word in tag for word in _SETTINGS)
            scalars[tag] = self.last[tag] if setting else total / count
        if self.clipping:
            scalars["train/clipped"] = self.clipped / self.clipping
        if self.skipped is not None:
            scalars["health/skipped_steps"] = float(self.skipped)
        return scalars


def _measured(steps: Steps, kind: Kind) -> Flags:
    """[n, T]"""
    return steps.statistic(kind, "numel") > 0
