"""What passes from the training thread to the publisher's thread, and from there to the sinks.

The training thread hands over `Steps` (statistics of every optimizer step) and, at a publication,
histograms; the publisher's thread makes a `Publication` of them, which every sink gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyvizllm.telemetry.dashboard import Layout

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]

Kind = Literal["grad", "param", "update"]
KINDS: tuple[Kind, ...] = ("grad", "param", "update")

Severity = Literal["info", "warning", "serious"]

EVALUATIONS = ("eval", "evaluation", "val", "valid", "validation", "dev", "test")

# The rows of `Steps.statistics`: those of TensorStats.values, then those of TensorStats.counts.
STATISTICS = (
    *("sum", "sum_squares", "abs_sum", "norm", "min", "max", "abs_max"),
    *("zeros", "nans", "pos_infs", "neg_infs", "numel"),
)


def is_evaluation(tag: str) -> bool:
    """Whether what is logged as `tag` is of the parameters as they are, and of no step."""
    return tag.partition("/")[0] in EVALUATIONS


@dataclass(frozen=True)
class MicroBatches:
    """What was seen after each micro-batch of n steps, M at most; absent ones are NaN or -1."""

    losses: Floats  # [n, M], NaN where none was given
    seen: Flags  # [n, M]
    squared_norms: Floats  # [n, M] of all gradients, as accumulated up to that micro-batch
    sizes: Counts  # [n, M] examples or counted targets; -1 where unknown
    sample_ids: Sequence[Sequence[object]]  # [n][M]: what the loader said of the batch, or None


@dataclass(frozen=True)
class Steps:
    """What was recorded of n consecutive optimizer steps over T parameters, on the host.

    `statistics[kind]` [n, 12, T]: the rows of STATISTICS of each parameter at each step. A
    parameter that was not measured in a step (no gradient; an update that was not asked for) has
    `numel` 0 there, and nothing else in that column means anything. A kind that was never
    measured is absent. NaNs among a tensor's values make its sums, norm and extremes NaN.
    """

    first: int  # the number of the first of the steps
    names: tuple[str, ...]  # [T]
    statistics: Mapping[Kind, Floats]
    wall_times: Floats  # [n] seconds since 1970, at the end of each step
    scalars: Mapping[str, Floats] = field(default_factory=dict)  # tag -> [n]: mean of a step's logs
    logged: Mapping[str, Flags] = field(default_factory=dict)  # tag -> [n]: whether there were any
    metrics: Floats | None = None  # [n, 53] CrossEntropyMetrics.sums; row [0] is the tokens
    skipped: Flags | None = None  # [n]: the optimizer skipped the step (GradScaler, skip_nonfinite)
    clipped: Floats | None = None  # [n] the max_norm of pyvizllm's own clipping, NaN where none
    bad_index: Counts | None = None  # [T] flat index of the first NaN or Inf in the gradient at the
    # first of these steps in which there was one; -1 where there was none
    micro_batches: MicroBatches | None = None

    def __len__(self) -> int:
        return len(self.wall_times)

    def statistic(self, kind: Kind, name: str) -> Floats:
        """[n, T]: one row of STATISTICS."""
        return self.statistics[kind][:, STATISTICS.index(name)]


@dataclass(frozen=True)
class HistogramTable:
    """Histograms of T tensors: 4096 bit-pattern bins each, and exact moments.

    `moments` [T, 4] float64: the minimum and the maximum of the finite values (NaN where there is
    none), their sum and their sum of squares.
    """

    tags: tuple[str, ...]  # [T]
    counts: Counts  # [T, 4096]
    moments: Floats


@dataclass(frozen=True)
class Finding:
    """Something that goes wrong, or may: what was seen, and what to do about it."""

    rule: str  # "vanishing_gradients": the name of the rule, for machines
    severity: Severity
    step: int  # the optimizer step in which it was seen first
    message: str  # what was seen, with the figures; no full stop, no step
    advice: str  # whole sentences, or ""
    evidence: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The message with its full stop."""
        return self.message if self.message.endswith((".", "!", "?")) else f"{self.message}."

    @property
    def text(self) -> str:
        """The message and the advice, in one line."""
        return f"{self.sentence} {self.advice}".rstrip()


@dataclass(frozen=True)
class Picture:
    """A PNG file, and its size in pixels."""

    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Publication:
    """Everything shown for one step. Keys are tags; `wall_time` is in seconds since 1970."""

    step: int
    wall_time: float
    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Sequence[HistogramTable] = ()
    texts: Mapping[str, str] = field(default_factory=dict)  # Markdown
    images: Mapping[str, Picture] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    arrays: Mapping[str, Sequence[float]] = field(default_factory=dict)  # for JSONL alone
    layout: Layout | None = None  # once a run; a chart is shown when it has something to show
    hparams: Mapping[str, bool | float | str] | None = None
