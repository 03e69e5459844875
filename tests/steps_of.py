"""A training loop that records itself as `Steps`, for tests of what reads them.

It says the same as the recorder, in the plainest way: every number is read at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyvizllm.ops import CrossEntropyMetrics, tensor_stats
from pyvizllm.telemetry.diagnosis import Diagnosis, DiagnosisOptions, ParameterInfo
from pyvizllm.telemetry.records import Finding, Kind, MicroBatches, Steps

LossOf = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, CrossEntropyMetrics]"]


@dataclass
class MicroBatch:
    """What was seen after the backward of one."""

    loss: float
    squared_norm: float
    size: int
    samples: object


@dataclass
class Recording:
    """Collects steps of `named` parameters, and hands them over as `Steps`."""

    named: Sequence[tuple[str, nn.Parameter]]
    first: int = 1
    rows: list[dict[Kind, np.ndarray]] = field(default_factory=list)
    scalars: dict[str, list[float]] = field(default_factory=dict)
    metrics: list[np.ndarray] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    batches: list[list[MicroBatch]] = field(default_factory=list)
    bad_index: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.bad_index = np.full(len(self.named), -1)
        self._open: list[MicroBatch] = []
        self._metrics = np.zeros(CrossEntropyMetrics.SIZE)

    def after_backward(
        self, loss: Tensor, metrics: CrossEntropyMetrics | None, size: int, samples: object
    ) -> None:
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        norm = tensor_stats(gradients, histogram=False).total_norm.item() if gradients else 0.0
        self._open.append(MicroBatch(loss.item(), norm**2, size, samples))
        if metrics is not None:
            self._metrics = self._metrics + metrics.sums.numpy()

    def before_step(self) -> None:
        gradients = [p.grad for _, p in self.named]
        self.rows.append({"grad": statistics(gradients)})
        for column, gradient in enumerate(gradients):
            if gradient is not None and self.bad_index[column] < 0:
                bad = (~gradient.isfinite()).flatten().nonzero()
                if len(bad):
                    self.bad_index[column] = int(bad[0])
        self._before = [p.detach().clone() for _, p in self.named]

    def after_step(self, loss: float, skipped: bool, clipped: float, **scalars: float) -> None:
        update = [p.detach() - old for (_, p), old in zip(self.named, self._before, strict=True)]
        self.rows[-1]["update"] = statistics(update)
        self.rows[-1]["param"] = statistics([p.detach() for _, p in self.named])
        self.skipped.append(skipped)
        self.clipped.append(clipped)
        for tag, value in {"train/loss": loss, **scalars}.items():
            self.scalars.setdefault(tag, []).append(value)
        self.batches.append(self._open)
        self.metrics.append(self._metrics)
        self._open, self._metrics = [], np.zeros(CrossEntropyMetrics.SIZE)

    def take(self) -> Steps:
        """What has been recorded, as one chunk; begins the next."""
        n = len(self.rows)
        kinds: tuple[Kind, ...] = ("grad", "param", "update")
        steps = Steps(
            first=self.first,
            names=tuple(name for name, _ in self.named),
            statistics={kind: np.stack([row[kind] for row in self.rows]) for kind in kinds},
            wall_times=np.full(n, time.time()),
            scalars={tag: np.array(values) for tag, values in self.scalars.items()},
            logged={tag: np.ones(n, np.bool_) for tag in self.scalars},
            metrics=np.stack(self.metrics) if np.any(self.metrics) else None,
            skipped=np.array(self.skipped),
            clipped=np.array(self.clipped),
            bad_index=self.bad_index,
            micro_batches=micro_batches(self.batches),
        )
        fresh = Recording(self.named, self.first + n)
        self.__dict__.update(fresh.__dict__)
        return steps


def statistics(tensors: Sequence[Tensor | None]) -> np.ndarray:
    """[12, T] float64, by our tensor_stats; columns of zeros for None."""
    empty = torch.zeros(0)
    stats = tensor_stats([empty if t is None else t for t in tensors], histogram=False)
    return torch.cat((stats.values, stats.counts.double())).numpy()


def micro_batches(batches: list[list[MicroBatch]]) -> MicroBatches:
    most = max(map(len, batches))
    shape = len(batches), most
    losses, norms = np.full(shape, np.nan), np.full(shape, np.nan)
    seen, sizes = np.zeros(shape, np.bool_), np.full(shape, -1)
    ids: list[list[object]] = [[None] * most for _ in batches]
    for row, step in enumerate(batches):
        for column, batch in enumerate(step):
            seen[row, column] = True
            losses[row, column], norms[row, column] = batch.loss, batch.squared_norm
            sizes[row, column], ids[row][column] = batch.size, batch.samples
    return MicroBatches(losses, seen, norms, sizes, ids)


@dataclass
class Fit:
    """A training under diagnosis; `findings` are all that it said."""

    findings: list[Finding]
    diagnosis: Diagnosis
    losses: list[float]

    def rules(self, least: str = "warning") -> list[str]:
        """Rules that said something of at least this severity, in order."""
        ranks = ("info", "warning", "serious")
        return [f.rule for f in self.findings if ranks.index(f.severity) >= ranks.index(least)]

    def of(self, rule: str) -> Finding:
        """The first finding of a rule."""
        return next(finding for finding in self.findings if finding.rule == rule)


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: LossOf,
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    max_norm: float | None = None,
    clip_before: float | None = None,
    accumulate: int = 1,
    chunk: int = 32,
    classes: int | None = None,
    before_step: Callable[[int], None] | None = None,
    evaluate: Callable[[], float] | None = None,
    eval_every: int = 50,
    log_rate: bool = True,
) -> Fit:
    """Train on every batch (tuples; a third element is the sample ids), and diagnose.

    `max_norm` clips after the statistics, as pyvizllm does; `clip_before` before, as others do.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    info = {name: ParameterInfo.of(p) for name, p in named}
    diagnosis = Diagnosis(DiagnosisOptions(info, classes))
    recording = Recording(named)
    findings: list[Finding] = []
    losses: list[float] = []
    window: list[float] = []
    for number, batch in enumerate(batches, 1):
        cast = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
        with cast:
            result = loss_of(model, batch)
        loss, metrics = result if isinstance(result, tuple) else (result, None)
        scaled = loss / accumulate
        (scaled if scaler is None else scaler.scale(scaled)).backward()
        window.append(loss.item())
        samples = batch[2] if len(batch) > 2 else None
        recording.after_backward(loss, metrics, len(batch[0]), samples)
        if number % accumulate:
            continue
        step = number // accumulate
        if before_step is not None:
            before_step(step)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip_before is not None:
            nn.utils.clip_grad_norm_(parameters, clip_before)
        recording.before_step()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        skipped = False
        if scaler is None:
            optimizer.step()
        else:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < scale
        rate = {"train/learning_rate": optimizer.param_groups[0]["lr"]} if log_rate else {}
        recording.after_step(
            sum(window) / len(window), skipped, np.nan if max_norm is None else max_norm, **rate
        )
        losses.append(sum(window) / len(window))
        window = []
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if len(recording.rows) == chunk:
            findings += diagnosis.add(recording.take())
        if evaluate is not None and step % eval_every == 0:
            findings += diagnosis.add_evaluation(step, {"eval/loss": evaluate()})
    if recording.rows:
        findings += diagnosis.add(recording.take())
    return Fit(findings, diagnosis, losses)
