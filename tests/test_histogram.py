"""Bins to buckets: the plain numpy version against counts that numpy makes of the same values
between the same edges, and the encoder against the plain version, value by value."""

import numpy as np
import pytest
from histogram_reference import (
    BINS,
    BucketTable,
    Histogram,
    bin_edges,
    histograms_of,
    log10_buckets,
    make_histograms,
    value_buckets,
)
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import HistogramProto

from pyvizllm import _events
from pyvizllm.telemetry import HistogramTable

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


# --- the encoder


def row_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins and moments of float32 `values`; what tensor_stats gives, NaN and Inf included."""
    narrow = values.astype(np.float32)
    counts = np.bincount(narrow.view(np.uint32) >> 20, minlength=BINS).astype(np.int64)
    with np.errstate(invalid="ignore"):  # the values that are NaN and Inf on purpose
        wide = narrow.astype(np.float64)
        return counts, np.array([wide.min(), wide.max(), wide.sum(), (wide**2).sum()])


def table_of(data: dict[str, np.ndarray]) -> HistogramTable:
    counts, moments = zip(*map(row_of, data.values()), strict=True)
    return HistogramTable(tuple(data), np.stack(counts), np.stack(moments))


def encode(table: HistogramTable, limit: int = 1 << 20) -> list[Event]:
    """The events of the encoder's records, by tensorboardX's protocol buffers."""
    tags = [f"grad/{tag}" for tag in table.tags]
    log10_tags = [f"grad_log10/{tag}" for tag in table.tags]
    records = _events.histogram_records(
        1.5, 7, tags, log10_tags, table.counts, table.moments, [], [], limit
    )
    return [Event.FromString(record[12:-4]) for record in records]


def shown(events: list[Event]) -> dict[str, HistogramProto]:
    return {value.tag: value.histo for event in events for value in event.summary.value}


def check_encoder(table: HistogramTable) -> None:
    """Every tag that has something to show, and every number of it, as the plain version has it."""
    histograms, found = histograms_of(table), shown(encode(table))
    expected_tags = set()
    for kind, expected, ulps in (
        ("grad", value_buckets(histograms), 0),
        ("grad_log10", log10_buckets(histograms), 1),  # a logarithm of another library
    ):
        for i, tag in enumerate(table.tags):
            begin, end = expected.offsets[i : i + 2]
            if begin == end:
                continue
            expected_tags.add(f"{kind}/{tag}")
            histo = found[f"{kind}/{tag}"]
            np.testing.assert_array_max_ulp(
                np.array(histo.bucket_limit), expected.limits[begin:end], ulps
            )
            np.testing.assert_array_equal(histo.bucket, expected.counts[begin:end])
            assert histo.num == expected.num[i]
            for name in ("min", "max"):
                value, reference = getattr(histo, name), getattr(expected, name)[i]
                assert abs(value - reference) <= ulps * np.spacing(abs(reference)), name
            # Their terms are summed in another order, or come from such a logarithm.
            scale = np.abs(histo.bucket_limit).max() * histo.num
            assert histo.sum == pytest.approx(expected.sum[i], rel=1e-13, abs=1e-13 * scale)
            assert histo.sum_squares == pytest.approx(expected.sum_squares[i], rel=1e-13)
    assert set(found) == expected_tags


@pytest.mark.parametrize("name", DATA | POISONED)
def test_the_encoder_agrees_with_the_plain_version(name: str) -> None:
    check_encoder(table_of({name: (DATA | POISONED)[name]}))


def test_the_encoder_on_many_histograms_at_once() -> None:
    table = table_of(DATA | POISONED)
    check_encoder(table)
    one_each, all_in_one = encode(table, limit=1), encode(table, limit=1 << 30)
    assert len(all_in_one) == 1
    assert len(one_each) == len(table.tags) - 3  # three have nothing to show
    assert shown(one_each) == shown(all_in_one)
    assert {(event.step, event.wall_time) for event in one_each} == {(7, 1.5)}


def test_the_encoder_on_invented_counts() -> None:
    """Counts above 2**31 and 2**40, single bins, bins of one sign, nothing at all."""
    generator = np.random.default_rng(1)
    counts = np.zeros((6, BINS), dtype=np.int64)
    counts[0] = generator.integers(2**31, 2**40, BINS)  # NaN's and Inf's bins too
    counts[1, 1016] = 2**33 + 1
    counts[2, 4087] = 1
    counts[3, 2048] = 5  # -0 alone
    counts[4] = generator.integers(0, 2, BINS) * generator.integers(1, 9, BINS)
    moments = np.full((6, 4), np.nan)
    moments[1] = 1.0, 1.1, 2.0**33, 2.0**33
    moments[4] = -1e30, 1e31, 3.0, np.inf  # one is not finite: all four are from the bins
    table = HistogramTable(tuple("abcdef"), counts, moments)
    check_encoder(table)
    found = shown(encode(table))
    assert found["grad/b"].bucket == [2**33 + 1]
    assert (found["grad/b"].min, found["grad/b"].max, found["grad/b"].sum) == (1.0, 1.1, 2.0**33)
    assert found["grad/e"].max > 1e38
    assert not {"grad/f", "grad_log10/d", "grad_log10/f"} & set(found)


def test_a_table_that_is_not_contiguous() -> None:
    table = table_of(DATA)
    wide = np.zeros((2 * len(table.tags), BINS + 8), dtype=np.int64)
    wide[::2, 8:] = table.counts
    moments = np.asfortranarray(table.moments)
    assert encode(HistogramTable(table.tags, wide[::2, 8:], moments)) == encode(table)


def test_no_histograms_no_record() -> None:
    empty = HistogramTable((), np.zeros((0, BINS), dtype=np.int64), np.zeros((0, 4)))
    assert encode(empty) == []


@pytest.mark.parametrize(
    ("counts", "moments", "sentence"),
    [
        (np.zeros((1, BINS), dtype=np.int32), np.zeros((1, 4)), r"counts .* and dtype int32"),
        (np.zeros(BINS, dtype=np.int64), np.zeros((1, 4)), r"counts of shape \[1, 4096\]"),
        (np.zeros((1, 4095), dtype=np.int64), np.zeros((1, 4)), r"got shape \(1, 4095\)"),
        (np.zeros((1, BINS), dtype=np.int64), np.zeros((4, 1)), r"moments of shape \[1, 4\]"),
        (np.zeros((1, BINS), dtype=np.int64), np.zeros((1, 4), "f4"), "dtype float32"),
    ],
)
def test_tables_that_are_none(counts: np.ndarray, moments: np.ndarray, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"histogram_records: expected .*{sentence}"):
        encode(HistogramTable(("w",), counts, moments))


def test_lists_of_other_lengths() -> None:
    counts, moments = np.zeros((1, BINS), dtype=np.int64), np.zeros((1, 4))
    with pytest.raises(ValueError, match="expected 1 log10_tags, got 2"):
        _events.histogram_records(0.0, 0, ["a"], ["b", "c"], counts, moments, [], [], 9)
    with pytest.raises(ValueError, match="expected no description or 1, got 2"):
        _events.histogram_records(0.0, 0, ["a"], ["b"], counts, moments, ["x", "y"], [], 9)
