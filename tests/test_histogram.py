"""Bins to buckets, against counts that numpy makes of the same values between the same edges."""

import numpy as np
import pytest

from pyvizllm.telemetry.histogram import (
    BINS,
    BucketTable,
    Histogram,
    bin_edges,
    log10_buckets,
    make_histograms,
    value_buckets,
)

_RNG = np.random.default_rng(0)
TINY = 2.0**-129  # everything below it shares zero's bin

# Each is float32. The sizes are of no importance but 1: one element alone must do.
DATA = {
    "normal": _RNG.normal(size=10_007),
    "gradients": _RNG.normal(size=5_000) * 1e-4,
    "heavy_tailed": _RNG.standard_t(1.1, size=20_000) * 1e-3,
    "across_all_exponents": _RNG.choice([-1, 1], 9_000) * 2.0 ** _RNG.uniform(-149, 127, 9_000),
    "powers_of_two": np.concatenate((2.0 ** np.arange(-10, 10), -(2.0 ** np.arange(-10, 10)))),
    "constant": np.full(1_000, 0.1),
    "negative_constant": np.full(33, -7.25),
    "zeros": np.zeros(100),
    "signed_zeros": np.array([0.0, -0.0] * 8),
    "relu": np.maximum(_RNG.normal(size=3_000), 0),
    "subnormal": _RNG.uniform(-1e-38, 1e-38, 4_000),
    "smallest": np.array([1e-45, -1e-45, 0.0]),
    "huge": np.array([1e30, -1e30, 3e38, 1e-30]),
    "largest": np.array([3.4028234e38, -3.4028234e38]),
    "one": np.array([42.0]),
    "one_negative": np.array([-1e-20]),
}
POISONED = {
    "nans": np.full(10, np.nan),
    "infs": np.array([np.inf, -np.inf]),
    "one_nan": np.append(_RNG.normal(size=500), np.nan),
    "one_inf": np.append(_RNG.normal(size=500), -np.inf),
    "nan_payloads": np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], dtype=np.uint32).view("f4"),
}


def histogram_of(values: np.ndarray) -> Histogram:
    """The bins of float32 `values`, and the statistics that tensor_stats would give."""
    narrow = values.astype(np.float32)
    counts = np.bincount(narrow.view(np.uint32) >> 20, minlength=BINS).astype(np.int64)
    with np.errstate(invalid="ignore"):  # the values that are NaN and Inf on purpose
        wide = narrow.astype(np.float64)
        row = [np.array([x]) for x in (wide.min(), wide.max(), wide.sum(), (wide**2).sum())]
    return make_histograms(counts[None], *row)[0]


def counts_between(values: np.ndarray, edges: np.ndarray, split: float) -> np.ndarray:
    """How many values lie between the edges; an edge belongs to the side away from `split`."""
    below = np.diff(np.searchsorted(np.sort(values[values < split]), edges, side="right"))
    above = np.diff(np.searchsorted(np.sort(values[values >= split]), edges, side="left"))
    return below + above


def check(
    table: BucketTable, index: int, values: np.ndarray, left: float, split: float = 0.0
) -> None:
    """Bucket counts, their sum, and the order of the edges; `left` is the first left edge."""
    begin, end = table.offsets[index : index + 2]
    limits, counts = table.limits[begin:end], table.counts[begin:end]
    assert (np.diff(limits) > 0).all()
    assert counts.sum() == table.num[index] == len(values)
    assert min(counts[0], counts[-1]) > 0
    edges = np.concatenate(([left], limits))
    np.testing.assert_array_equal(counts, counts_between(values, edges, split))
    assert not ((counts[1:] == 0) & (counts[:-1] == 0)).any(), "two empty buckets in a row"


@pytest.mark.parametrize("name", DATA)
def test_value_axis_counts_are_numpys(name: str) -> None:
    values = DATA[name].astype(np.float32).astype(np.float64)
    table = value_buckets([histogram_of(values)])
    check(table, 0, values, -(2.0**128))
    assert (table.min[0], table.max[0]) == (values.min(), values.max())
    assert table.limits[-1] >= values.max()
    assert (table.sum[0], table.sum_squares[0]) == (values.sum(), (values**2).sum())
    assert len(table.limits) < 700


@pytest.mark.parametrize("name", DATA)
def test_log10_axis_folds_signs_and_leaves_zeros_out(name: str) -> None:
    values = np.abs(DATA[name].astype(np.float32).astype(np.float64))
    values = values[values >= TINY]
    table = log10_buckets([histogram_of(DATA[name])])
    if len(values) == 0:
        assert len(table.limits) == table.num[0] == 0
        return
    check(table, 0, np.log10(values), np.log10(TINY), split=-np.inf)
    assert table.max[0] == pytest.approx(np.log10(values.max()), abs=1e-12)
    # The smallest |x| is known to a bin: an eighth of an octave, one bit of a subnormal's few.
    assert table.min[0] <= np.log10(values.min()) <= table.limits[0]


@pytest.mark.parametrize("name", POISONED)
def test_nan_and_inf_are_in_no_bucket(name: str) -> None:
    values = POISONED[name].astype(np.float32)
    finite = values[np.isfinite(values)].astype(np.float64)
    histogram = histogram_of(values)
    table = value_buckets([histogram])
    assert table.num[0] == len(finite) == table.counts.sum()
    if len(finite) == 0:
        assert np.isnan([histogram.min, histogram.max]).all()
        assert histogram.sum == histogram.sum_squares == 0
        assert len(table.limits) == len(log10_buckets([histogram]).limits) == 0
        return
    check(table, 0, finite, -(2.0**128))
    assert finite.min() * 1.125 <= table.min[0] <= finite.min() < 0
    assert 0 < finite.max() <= table.max[0] <= finite.max() * 1.125
    assert table.sum_squares[0] == pytest.approx((finite**2).sum(), rel=0.05)


def test_many_histograms_at_once_are_the_same_as_each_alone() -> None:
    everything = [histogram_of(values) for values in (DATA | POISONED).values()]
    for convert in (value_buckets, log10_buckets):
        table = convert(everything)
        assert len(table.offsets) == len(everything) + 1
        for i, histogram in enumerate(everything):
            alone, part = convert([histogram]), slice(table.offsets[i], table.offsets[i + 1])
            np.testing.assert_array_equal(table.limits[part], alone.limits)
            np.testing.assert_array_equal(table.counts[part], alone.counts)
            for name in ("min", "max", "num", "sum", "sum_squares"):
                np.testing.assert_array_equal(getattr(table, name)[i], getattr(alone, name)[0])


def test_no_histograms() -> None:
    for convert in (value_buckets, log10_buckets):
        table = convert([])
        assert table.offsets.tolist() == [0]
        assert len(table.limits) == len(table.min) == 0


def test_value_axis_keeps_the_shape_at_the_drawn_resolution() -> None:
    table = value_buckets([histogram_of(DATA["normal"])])
    widths = np.diff(table.limits)
    span = table.limits[-1] - table.limits[0]
    inner = np.abs(table.limits[1:]) < 1  # 1 is the left edge of bins that are 1/8 wide
    assert widths[inner].max() <= 1 / 16
    assert len(table.limits) < 400
    assert widths.min() < span / 500


def test_bin_edges_contain_their_values_and_touch() -> None:
    for value in (1.0, -1.0, 0.1, -3e38, 1e-40, 7.999, 1e30):
        narrow = np.float32(value)
        low, high = bin_edges(int(narrow.view(np.uint32) >> 20))
        assert low <= narrow <= high
    assert (bin_edges(0), bin_edges(2048)) == ((0.0, TINY), (-TINY, -0.0))
    assert (bin_edges(1016), bin_edges(3064)) == ((1.0, 1.125), (-1.125, -1.0))
    assert bin_edges(2039)[1] == 2.0**128
    assert all(bin_edges(i)[1] == bin_edges(i + 1)[0] for i in range(2039))


@pytest.mark.parametrize("index", [-1, 2040, 2047, 4088, 4095, 4096])
def test_bin_edges_refuses_bins_without_finite_values(index: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a bin of finite values, got {index}"):
        bin_edges(index)
