"""From steps to what is shown of them: scalars over the interval, and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyvizllm.telemetry.records import (
    KINDS,
    Counts,
    Floats,
    HistogramTable,
    Kind,
    Publication,
    Steps,
)


class Assembler:
    """Keeps the steps since the last publication.

    Arguments:
        names: of the parameters; those of the steps may be more.
        max_tags: ignored.
        histograms: the kinds to show.
    """

    def __init__(
        self, names: Sequence[str], *, max_tags: int = 2000, histograms: Sequence[Kind] = KINDS
    ) -> None:
        self.grad_stage = ""
        self._kinds = tuple(histograms)
        self._steps: list[Steps] = []

    def add(self, steps: Steps) -> None:
        self._steps.append(steps)

    def publish(
        self,
        step: int,
        wall_time: float,
        histograms: Mapping[Kind, tuple[Counts, Floats]],
        seconds: float | None = None,
    ) -> Publication:
        steps, self._steps = self._steps, []
        scalars: dict[str, float] = {}
        with np.errstate(all="ignore"):
            _loss_scalars(steps, scalars)
            for tag in dict.fromkeys(tag for part in steps for tag in part.scalars):
                values = np.concatenate(
                    [p.scalars[tag][p.logged[tag]] for p in steps if tag in p.scalars]
                )
                scalars[tag] = float(values[-1] if "learning_rate" in tag else values.mean())
            _norms(steps, scalars)
        metrics = [part.metrics for part in steps if part.metrics is not None]
        if metrics and seconds:
            scalars["train/tokens_per_second"] = (
                float(np.concatenate(metrics)[:, 0].sum()) / seconds
            )
        names = steps[-1].names if steps else ()
        tables = []
        for kind in self._kinds:
            if kind not in histograms:
                continue
            counts, moments = histograms[kind]
            shown = np.flatnonzero(counts.any(1))
            tags = tuple(f"{kind}/{names[i]}" for i in shown)
            if tags:
                tables.append(HistogramTable(tags, counts[shown], moments[shown]))
        return Publication(step, wall_time, scalars, tables)


def _loss_scalars(steps: Sequence[Steps], scalars: dict[str, float]) -> None:
    metrics = [part.metrics for part in steps if part.metrics is not None]
    if metrics:
        tokens, correct, loss, entropy = np.concatenate(metrics).sum(0)[:4]
        scalars["train/loss"] = float(loss / tokens)
        scalars["train/accuracy"] = float(correct / tokens)
        scalars["train/perplexity"] = float(np.exp(loss / tokens))
        scalars["train/entropy"] = float(entropy / tokens)


def _norms(steps: Sequence[Steps], scalars: dict[str, float]) -> None:
    steps = [part for part in steps if "grad" in part.statistics]
    if not steps:
        return
    norms = [np.sqrt(part.statistic("grad", "sum_squares").sum(1)) for part in steps]
    measured = [part.statistic("grad", "numel").any(1) for part in steps]
    all_norms = np.concatenate(norms)[np.concatenate(measured)]
    if len(all_norms):
        scalars["train/grad_norm"] = float(all_norms.mean())
        scalars["train/grad_norm_max"] = float(all_norms.max())
    bad = sum(part.statistic("grad", "nans").sum() for part in steps)
    infs = sum(part.statistics["grad"][:, 9:11].sum() for part in steps)
    scalars |= {"health/nans": float(bad), "health/infs": float(infs)}
    for i, name in enumerate(steps[-1].names):
        own = [
            part.statistic("grad", "norm")[part.statistic("grad", "numel")[:, i] > 0, i]
            for part in steps
            if i < len(part.names)
        ]
        values = np.concatenate(own)
        if len(values):
            scalars[f"grad_norm/{name}"] = float(values.mean())
