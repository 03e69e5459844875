"""The plain numpy version of csrc/events/buckets.cpp: bit-pattern bins to TensorBoard's buckets.

Bin of x: the top 12 bits of its float32 bit pattern (1 sign, 8 exponent, 3 mantissa bits). So the
bins 0..2039 hold the finite x >= 0 in rising order, 2048..4087 the finite x <= 0 in falling order,
and 2040..2047 and 4088..4095 hold Inf and NaN. Every finite bin has exact edges; the edge nearer
to zero belongs to the bin. Bins 0 and 2048 hold +-0 and everything smaller than 2**-129.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyvizllm.ops import BINS
from pyvizllm.telemetry import HistogramTable

FINITE_BINS = 2040  # of each sign
VALUE_RESOLUTION = 1024

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

# [2041] the edges of bins 0..2039, rising; above the last one, 2**128, a float32 is infinite.
_MAGNITUDES: Floats = np.append(
    (np.arange(FINITE_BINS, dtype=np.uint32) << 20).view(np.float32).astype(np.float64), 2.0**128
)
# [4080] the edges on the value axis, where bins 2048 and 0 are one bucket around zero.
_VALUE_EDGES: Floats = np.concatenate((-_MAGNITUDES[:0:-1], _MAGNITUDES[1:]))
# [2040] the edges on the log10|x| axis, which starts above the bins that hold zero.
_LOG10_EDGES: Floats = np.log10(_MAGNITUDES[1:])


@dataclass(frozen=True)
class Histogram:
    """Counts of one tensor's (or several steps') values, with their exact moments.

    `counts` [4096] int64. `min` and `max` are those of the finite values (NaN where there are
    none), `sum` and `sum_squares` are over the finite values.
    """

    counts: Counts
    min: float
    max: float
    sum: float
    sum_squares: float


@dataclass(frozen=True)
class BucketTable:
    """TensorBoard buckets of T histograms, one after the other; all arrays are float64.

    Histogram i owns `limits[offsets[i]:offsets[i + 1]]` (right edges, strictly rising) and the
    same range of `counts`; the range is empty where nothing is to be shown. `min`, `max`, `num`,
    `sum` and `sum_squares` are [T].
    """

    limits: Floats
    counts: Floats
    offsets: Counts
    min: Floats
    max: Floats
    num: Floats
    sum: Floats
    sum_squares: Floats


def bin_edges(index: int) -> tuple[float, float]:
    """The lower and the upper edge of bin `index`; ValueError if it holds no finite values."""
    negative, magnitude = divmod(index, BINS // 2)
    if not 0 <= index < BINS or magnitude >= FINITE_BINS:
        raise ValueError(f"bin_edges: expected a bin of finite values, got {index}")
    near, far = float(_MAGNITUDES[magnitude]), float(_MAGNITUDES[magnitude + 1])
    return (-far, -near) if negative else (near, far)


def make_histograms(
    counts: Counts, minimum: Floats, maximum: Floats, total: Floats, squares: Floats
) -> list[Histogram]:
    """One Histogram for each row of `counts` [T, 4096]; the statistics are [T].

    Where a statistic is not finite (a NaN or Inf was among the values) the row's statistics are
    taken from the bins instead: edges for min and max, the middles of bins for the sums.
    """
    statistics = np.stack((minimum, maximum, total, squares), axis=1).astype(np.float64)
    for row in np.flatnonzero(~np.isfinite(statistics).all(axis=1)):
        statistics[row] = _statistics_from_bins(counts[row])
    rows = statistics.tolist()  # numpy, on the worker: not a sync point
    return [Histogram(row, *moments) for row, moments in zip(counts, rows, strict=True)]


def histograms_of(table: HistogramTable) -> list[Histogram]:
    """The rows of a table, with moments from the bins where they have to be."""
    return make_histograms(table.counts, *table.moments.T)


def value_buckets(histograms: Sequence[Histogram]) -> BucketTable:
    """Buckets on the value axis: exact edges, only the occupied range, +0 and -0 together.

    Neighbouring bins narrower than 1/1024 of the histogram's range are merged (TensorBoard draws
    30 bins over it; the log10 axis keeps the detail near zero), and a run of empty bins is one
    empty bucket, so that a histogram has a few hundred buckets at most.
    """
    dense = np.empty((len(histograms), len(_VALUE_EDGES) - 1), dtype=np.int64)
    middle = FINITE_BINS - 1
    for row, histogram in zip(dense, histograms, strict=True):
        negative = histogram.counts[BINS // 2 : BINS // 2 + FINITE_BINS]
        row[:middle] = negative[:0:-1]
        row[middle:] = histogram.counts[:FINITE_BINS]
        row[middle] += negative[0]
    table = _buckets(
        dense,
        _VALUE_EDGES,
        np.array([h.min for h in histograms], dtype=np.float64),
        np.array([h.max for h in histograms], dtype=np.float64),
        resolution=VALUE_RESOLUTION,
    )
    table.sum[:] = [h.sum for h in histograms]
    table.sum_squares[:] = [h.sum_squares for h in histograms]
    return table


def log10_buckets(histograms: Sequence[Histogram]) -> BucketTable:
    """Buckets on the log10|x| axis, both signs folded, 8 an octave.

    Zeros are left out, and with them everything smaller than 2**-129 (1.5e-39), which shares
    their bin. The sums are estimates from the middles of the bins.
    """
    dense = np.empty((len(histograms), len(_LOG10_EDGES) - 1), dtype=np.int64)
    half = BINS // 2
    for row, h in zip(dense, histograms, strict=True):
        np.add(h.counts[1:FINITE_BINS], h.counts[half + 1 : half + FINITE_BINS], out=row)
    largest = np.array([max(abs(h.min), abs(h.max)) for h in histograms], dtype=np.float64)
    with np.errstate(divide="ignore"):  # an all-zero tensor has no bucket to clip -inf to
        maximum = np.log10(largest)
    minimum = np.full(len(histograms), -np.inf)  # the smallest |x| is unknown: its bin's edge
    return _buckets(dense, _LOG10_EDGES, minimum, maximum, resolution=None)


def _buckets(
    dense: Counts, edges: Floats, minimum: Floats, maximum: Floats, resolution: int | None
) -> BucketTable:
    """The occupied bins of `dense` [T, B] with `edges` [B + 1]; min and max kept inside them."""
    tensors = np.arange(len(dense) + 1)
    rows, bins = np.nonzero(dense)
    counts = dense[rows, bins]
    left, right = edges[bins], edges[bins + 1]
    entries = np.searchsorted(rows, tensors)
    shown = np.flatnonzero(np.diff(entries))
    low, high = np.zeros(len(dense)), np.zeros(len(dense))
    low[shown], high[shown] = left[entries[shown]], right[entries[shown + 1] - 1]

    starts = _starts(rows)
    if resolution is not None:
        starts |= _starts(np.floor(left / ((high - low) / resolution)[rows]))
    else:
        starts[:] = True
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(rows))[: len(first)] - 1
    rows_, left_, right_ = rows[first], left[first], right[last]
    counts_ = np.add.reduceat(counts, first) if len(first) else counts
    gaps = 1 + np.flatnonzero((rows_[1:] == rows_[:-1]) & (left_[1:] != right_[:-1]))

    centre, weight = (left + right) / 2, counts.astype(np.float64)
    return BucketTable(
        limits=np.insert(right_, gaps, left_[gaps]),
        counts=np.insert(counts_.astype(np.float64), gaps, 0.0),
        offsets=np.searchsorted(np.insert(rows_, gaps, rows_[gaps]), tensors),
        min=np.clip(minimum, low, high),
        max=np.clip(maximum, low, high),
        num=_row_sums(rows, weight, len(dense)),
        sum=_row_sums(rows, weight * centre, len(dense)),
        sum_squares=_row_sums(rows, weight * centre**2, len(dense)),
    )


def _row_sums(rows: Counts, values: Floats, length: int) -> Floats:
    return np.asarray(np.bincount(rows, values, minlength=length), dtype=np.float64)


def _starts(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where a value [K] differs from the one before it; the first always does."""
    starts = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return starts


def _statistics_from_bins(counts: Counts) -> tuple[float, float, float, float]:
    """(min, max, sum, sum of squares) of the finite values counted in `counts` [4096]."""
    magnitudes = np.flatnonzero(counts.reshape(2, -1)[:, :FINITE_BINS].any(axis=0))
    if len(magnitudes) == 0:
        return float("nan"), float("nan"), 0.0, 0.0
    edges, total, squares = [], 0.0, 0.0
    for index in np.flatnonzero(counts):
        if index % (BINS // 2) < FINITE_BINS:
            low, high = bin_edges(int(index))
            edges += [low, high]
            total += (low + high) / 2 * float(counts[index])
            squares += ((low + high) / 2) ** 2 * float(counts[index])
    return min(edges), max(edges), total, squares
