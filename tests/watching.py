"""A watch without files, whose steps and publications the tests look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyvizllm.telemetry import Publication, Publisher, Watch
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.records import KINDS, Counts, Floats, Kind, Steps


@dataclass
class Seen:
    """What the assembler and the sink were given, by the publisher's thread."""

    steps: list[Steps] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    histograms: list[dict[Kind, tuple[Counts, Floats]]] = field(default_factory=list)
    scalars: list[Mapping[str, float]] = field(default_factory=list)
    sketches: list[tuple[int, Floats]] = field(default_factory=list)
    names: tuple[str, ...] = ()
    grad_stage: str = ""

    # An assembler
    def add(self, steps: Steps) -> None:
        self.steps.append(steps)
        self.names = steps.names

    def start(self, step: int, names: tuple[str, ...], sketch: Floats) -> None:
        self.sketches.append((step, sketch))

    def finish(self, step: int, wall_time: float) -> Publication | None:
        return None

    def publish(
        self,
        step: int,
        wall_time: float,
        histograms: Any,
        seconds: float | None = None,
        sketch: Floats | None = None,
    ) -> Publication:
        if sketch is not None:
            self.sketches.append((step, sketch))
        assert seconds is not None
        self.seconds.append(seconds)
        self.published.append(step)
        self.stages.append(self.grad_stage)
        # Copies: the counts are used again once the sinks have seen them.
        self.histograms.append({k: (c.copy(), m.copy()) for k, (c, m) in histograms.items()})
        return Publication(step, wall_time, {"x/step": float(step)})

    # A sink
    def write(self, publication: Publication) -> None:
        self.scalars.append(publication.scalars)

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    # What the tests ask for
    def statistic(self, kind: Kind, name: str, parameter: str) -> Floats:
        """[all steps] of one parameter; 0 where it was in no hand-over yet."""
        parts = []
        for steps in self.steps:
            known = kind in steps.statistics and parameter in steps.names
            if known:
                parts.append(steps.statistic(kind, name)[:, steps.names.index(parameter)])
            else:
                parts.append(np.zeros(len(steps)))
        return np.concatenate(parts)

    def scalar(self, tag: str) -> Floats:
        """[all steps], NaN where it was not logged."""
        parts = []
        for steps in self.steps:
            values = np.full(len(steps), np.nan)
            if tag in steps.scalars:
                values[steps.logged[tag]] = steps.scalars[tag][steps.logged[tag]]
            parts.append(values)
        return np.concatenate(parts)

    def counts(self, publication: int, kind: Kind, parameter: str) -> Counts:
        return self.histograms[publication][kind][0][self.names.index(parameter)]

    def moments(self, publication: int, kind: Kind, parameter: str) -> Floats:
        return self.histograms[publication][kind][1][self.names.index(parameter)]


def watching(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] | None,
    *,
    every: int = 3,
    budget: float | None = None,
    **options: Any,
) -> tuple[Watch, Seen]:
    seen = Seen()
    names = WatchedNames(model, options.pop("include", None), options.pop("exclude", None))
    device = next(model.parameters()).device
    watch = Watch(
        names,
        optimizers,
        Publisher([seen]),
        lambda shown: seen,
        overhead=Overhead(every, budget, device),
        histograms=options.pop("histograms", KINDS),
        **options,
    )
    return watch, seen


def bins_of(values: Sequence[Tensor]) -> Counts:
    """[4096]: the definition of the bins, in NumPy."""
    flat = np.concatenate([v.detach().float().cpu().numpy().ravel() for v in values])
    return np.bincount(flat.view(np.uint32) >> 20, minlength=4096)


def norm(values: Sequence[Tensor]) -> float:
    """Euclidean, in float64."""
    return float(np.sqrt(sum((v.detach().cpu().double().numpy() ** 2).sum() for v in values)))
