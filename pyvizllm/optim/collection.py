"""What an optimizer collects of a step: statistics, and histograms that add up over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyvizllm.ops.tensor_stats import BINS, TensorStats


@dataclass(frozen=True)
class StepStatistics:
    """Statistics of one optimizer step over `T` parameters, on their device.

    A parameter without a gradient has the statistics of an empty tensor, and so have the `update`
    and `param` of all parameters in a step that was skipped. Histograms hold the counts of all
    steps since they were last taken.
    """

    parameters: Sequence[Tensor]
    """The parameters of all groups, in order: row `t` of every statistic is of `parameters[t]`."""
    names: Sequence[str] | None
    """Their names, where the optimizer was made from named parameters."""
    grad: TensorStats | None
    """Of the gradients as the optimizer saw them: unscaled, and before clipping."""
    update: TensorStats | None
    """Of the change that the step made: the parameter as stored, after minus before; with master
    weights, the change of those, which may be too small to show in the parameter."""
    param: TensorStats | None
    """Of the parameters after the step."""

    @property
    def update_ratio(self) -> Tensor:
        """[T] float64: norm of the update / norm of the parameter; inf or NaN where that is 0."""
        if self.update is None or self.param is None:
            raise RuntimeError(
                "update_ratio: expected statistics of both update and param, got fewer; "
                "ask for them before the step: optimizer.collect(update=True, param=True)"
            )
        return self.update.norm / self.param.norm


@dataclass
class Collector:
    """Which statistics of a step are wanted, and where its histograms are counted."""

    grad: bool = False
    update: bool = False
    param: bool = False
    histograms: bool = False
    _counts: dict[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] | None = None
    """Counts of somebody else's to add to, by kind; other kinds are not counted."""

    def __bool__(self) -> bool:
        return self.grad or self.update or self.param

    @property
    def from_step(self) -> bool:
        """Whether the step itself collects anything."""
        return self.update or self.param

    def histogram(self, kind: str, parameters: Sequence[Tensor]) -> Tensor | None:
        """The counts [parameters, 4096] int64 to add to; None where they are not wanted."""
        if not (parameters and self.histograms and getattr(self, kind)):
            return None
        if self.given is not None:
            return self._given(kind, len(parameters))
        counts = self._counts.get(kind)
        device = parameters[0].device
        if counts is None or len(counts) != len(parameters) or counts.device != device:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "AdamW: expected a step that collects before the capture of a CUDA graph, "
                    "got no histograms: the graph would zero new ones at each replay"
                )
            shape = (len(parameters), BINS)
            before = counts
            counts = self._counts[kind] = torch.zeros(shape, dtype=torch.int64, device=device)
            if before is not None:  # a group was added since, or the model was moved
                counts[: len(before)] = before.to(device)
        return counts

    def _given(self, kind: str, rows: int) -> Tensor | None:
        counts = None if self.given is None else self.given.get(kind)
        if counts is not None and (counts.shape != (rows, BINS) or counts.dtype != torch.int64):
            raise ValueError(
                f"AdamW.collect_next: expected histograms[{kind!r}] to be int64 of shape "
                f"{[rows, BINS]}, got {counts.dtype} of shape {list(counts.shape)}"
            )
        return counts

    def changed(self, grad: bool, update: bool, param: bool, histograms: bool) -> Collector:
        """Another choice, with the same counts, from 0: a captured graph may still add to them."""
        for counts in self._counts.values():
            counts.zero_()
        return Collector(grad, update, param, histograms, self._counts)

    def take(self, collected: StepStatistics | None) -> StepStatistics | None:
        """Give `collected` counts of its own, and begin again with 0."""

        def own(stats: TensorStats | None) -> TensorStats | None:
            if stats is None or stats.histogram is None:
                return stats
            return replace(stats, histogram=stats.histogram.clone())

        if collected is not None:
            collected = replace(
                collected,
                grad=own(collected.grad),
                update=own(collected.update),
                param=own(collected.param),
            )
        for counts in self._counts.values():
            counts.zero_()
        return collected

    def result(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str] | None,
        grad: TensorStats | None,
        outputs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    ) -> StepStatistics:
        """Put together what `adamw_` returned of each group: (values, counts) of update, param."""
        statistics: dict[str, TensorStats | None] = {"update": None, "param": None}
        for index, kind in enumerate(("update", "param")):
            if getattr(self, kind):
                values, counts = (
                    torch.cat([output[2 * index + i] for output in outputs], dim=1)
                    if len(outputs) > 1
                    else outputs[0][2 * index + i]
                    for i in (0, 1)
                )
                histogram = self.histogram(kind, parameters)
                total = values[1].sum().sqrt()  # of the sums of squares
                statistics[kind] = TensorStats(values, counts, total, histogram)
        return StepStatistics(parameters, names, grad if self.grad else None, **statistics)
