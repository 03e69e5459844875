"""tensor_stats against numpy, in float64 from the same inputs.

Sizes: 0 (empty, anywhere in the list), 1, 15, 16, 17 (around a vector), 1023..1025 (a block), 65536
and 65537 (a chunk, and one more: counted by several threads), 200003 (odd, several chunks).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pyvizllm.ops import BINS, TensorStats, tensor_stats

SIZES = (0, 1, 15, 16, 17, 1023, 1024, 1025, 65536, 65537, 200003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(23)


def data_of_kind(kind: str, size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "gradient":
        x *= 1e-4
    elif kind == "heavy":
        x *= torch.exp(6 * torch.randn(size, generator=generator, dtype=torch.float64))
    elif kind == "embedding":  # mostly zeros, some of them negative
        x[torch.rand(size, generator=generator) < 0.9] = 0.0
        x[::7] = -0.0
    elif kind == "constant":
        x[:] = -0.37
    elif kind == "zero":
        x[:] = 0.0
    elif kind == "tiny":  # squares underflow float32, and most values are subnormal there
        x *= 1e-39
    elif kind == "huge":  # squares overflow float32
        x *= 1e25
    elif kind == "broken":
        x[::5] = torch.inf
        x[::11] = -torch.inf
        x[::17] = torch.nan
    else:
        assert kind == "normal"
    return x.to(dtype)


KINDS = ("normal", "gradient", "heavy", "embedding", "constant", "zero", "tiny", "huge", "broken")


def histogram_oracle(x: Tensor) -> Tensor:
    """Counts of the top 12 bits of the float32 patterns."""
    bits = x.reshape(-1).to(torch.float32).cpu().numpy().view(np.uint32)
    return torch.from_numpy(np.bincount(bits >> 20, minlength=BINS).astype(np.int64)).to(x.device)


def check(stats: TensorStats, tensors: list[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        x = tensor.reshape(-1).double()
        # Float32 sums over at most 64 vectors of a block, then float64: some 64 roundings.
        # Float64 is added one after the other over a chunk of 65536.
        rtol, scale = (1e-11, 1e-11) if tensor.dtype == torch.float64 else (4e-6, 4e-6)
        nan = bool(x.isnan().any())
        for got, expected, atol in (
            (stats.sum[index], x.sum(), scale * x.abs().sum()),
            (stats.sum_squares[index], (x * x).sum(), 0),
            (stats.abs_sum[index], x.abs().sum(), 0),
            (stats.norm[index], (x * x).sum().sqrt(), 0),
        ):
            if not torch.isfinite(expected):
                assert torch.equal(got, expected) or (got.isnan() and expected.isnan())
            else:
                assert abs(got - expected) <= rtol * abs(expected) + atol
        if len(x) == 0:
            assert (stats.min[index], stats.max[index], stats.abs_max[index]) == (
                torch.inf,
                -torch.inf,
                0,
            )
        elif nan:
            for value in (stats.min, stats.max, stats.abs_max):
                assert value[index].isnan()
        else:
            assert stats.min[index] == x.min()
            assert stats.max[index] == x.max()
            assert stats.abs_max[index] == x.abs().max()
        assert stats.zeros[index] == (x == 0).sum()
        assert stats.nans[index] == x.isnan().sum()
        assert stats.pos_infs[index] == x.isposinf().sum()
        assert stats.neg_infs[index] == x.isneginf().sum()
        assert stats.numel[index] == len(x)
        assert stats.histogram is not None
        assert torch.equal(fold_nans(stats.histogram[index]), fold_nans(histogram_oracle(tensor)))


def fold_nans(counts: Tensor) -> Tensor:
    """Which of the NaN bins a float16 NaN takes depends on who widens it; their sum does not."""
    counts = counts.clone()
    nans = torch.cat([counts[2041:2048], counts[4089:4096]])
    counts[2041:2048] = counts[4089:4096] = 0
    return torch.cat([counts, nans.sum()[None]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_statistics_and_histogram(dtype, kind, generator):
    tensors = [data_of_kind(kind, size, dtype, generator) for size in SIZES]
    stats = tensor_stats(tensors)
    check(stats, tensors)
    total = sum((t.double() ** 2).sum() for t in tensors).sqrt()
    torch.testing.assert_close(stats.total_norm, total, rtol=4e-6, atol=0, equal_nan=True)


def test_oracle_every_float16_and_bfloat16_value():
    """All 65536 bit patterns: subnormals, infinities and NaNs of every payload."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        finite = x[x.isfinite()]
        check(tensor_stats([x, finite]), [x, finite])


def test_oracle_mixed_list_with_empties(generator):
    tensors = [
        data_of_kind(kind, size, dtype, generator)
        for kind, size, dtype in (
            ("normal", 0, torch.float32),
            ("normal", 100_000, torch.bfloat16),
            ("gradient", 3, torch.float32),
            ("heavy", 70_000, torch.float64),
            ("normal", 0, torch.float16),
            ("gradient", 300_001, torch.float32),
            ("embedding", 20, torch.float16),
            ("normal", 0, torch.float32),
        )
    ]
    check(tensor_stats(tensors), tensors)


def test_a_lone_empty_tensor():
    stats = tensor_stats([torch.empty(0)])
    check(stats, [torch.empty(0)])
    assert stats.total_norm == 0


def test_one_nan_or_inf_shows(generator):
    for position in (0, 5, 1000, 65535, 65536, 99_999):
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(100_000, generator=generator)
            x[position] = value
            stats = tensor_stats([x, torch.ones(3)])
            check(stats, [x, torch.ones(3)])
            assert not torch.isfinite(stats.total_norm)
            assert stats.norm[1] == 3**0.5


def test_scales_that_change_within_a_tensor(generator):
    """Pairs of neighbours are counted in a window of 16 octaves, which has to follow the data."""
    scales = torch.tensor([1e-38, 1e30, 1e-6, 1e-3, 1e-20, 3e38, 1e-45, 1.0])
    x = torch.randn(8, 150_001, generator=generator) * scales[:, None]
    x[2, ::9] = 0.0
    x[3, ::13] *= 1e9
    x[4, :70_000] = torch.nan
    x[5, ::2] = -torch.inf
    x[7] = -0.37
    check(tensor_stats([x, x.flip(0)]), [x, x.flip(0)])


def test_layouts(generator):
    base = torch.randn(64, 48, generator=generator)
    tensors = [
        base.t(),
        base[:, 3:40],
        torch.randn(1, generator=generator).expand(5000),
        torch.randn(4, 5, 6, generator=generator).permute(2, 0, 1),
        base[1:, 1:].flatten()[1:],  # starts at an odd address
        torch.tensor(3.0),
    ]
    check(tensor_stats(tensors), tensors)


def test_accumulates_into_a_given_histogram(generator):
    tensors = [torch.randn(n, generator=generator) for n in (10, 100_000)]
    histogram = torch.ones(2, BINS, dtype=torch.int64)
    first = tensor_stats(tensors, histogram=histogram)
    assert first.histogram is histogram
    tensor_stats(tensors, histogram=histogram)
    expected = torch.stack([histogram_oracle(t) for t in tensors])
    assert torch.equal(histogram, 2 * expected + 1)


def test_autograd_sees_that_a_given_histogram_was_added_to():
    histogram = torch.zeros(1, BINS, dtype=torch.int64)
    weight = torch.ones(1, BINS, requires_grad=True)
    tensor_stats([torch.ones(2)], histogram=histogram)
    product = (weight * histogram).sum()
    tensor_stats([torch.ones(5)], histogram=histogram)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_without_histogram(generator):
    tensors = [data_of_kind("broken", 100_000, torch.float32, generator), torch.ones(3)]
    with_histogram, without = tensor_stats(tensors), tensor_stats(tensors, histogram=False)
    assert without.histogram is None
    torch.testing.assert_close(
        without.values, with_histogram.values, equal_nan=True, rtol=0, atol=0
    )
    assert torch.equal(without.counts, with_histogram.counts)


def test_repr_has_names_and_shapes():
    """No numbers, which would have to come from the device."""
    names = (
        "sum, sum_squares, abs_sum, norm, min, max, abs_max, zeros, nans, pos_infs, neg_infs, numel"
    )
    stats = tensor_stats([torch.full((3,), 17.0), torch.empty(0)])
    assert repr(stats) == (
        f"TensorStats({names}: [2], total_norm: [], histogram: [2, 4096], device: cpu)"
    )
    stats = tensor_stats([torch.full((3,), 17.0)], histogram=False)
    assert repr(stats) == f"TensorStats({names}: [1], total_norm: [], histogram: None, device: cpu)"


def test_same_result_for_any_number_of_threads(generator):
    tensors = [torch.randn(n, generator=generator) for n in (3, 1_000_003, 70_000, 0, 5)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(tensor_stats(tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.values, results[0].values)
        assert torch.equal(other.histogram, results[0].histogram)
        assert torch.equal(other.total_norm, results[0].total_norm)


def test_agrees_with_torchs_norm(generator):
    tensors = [torch.randn(n, generator=generator) * 1e-3 for n in (768, 100_000, 2_000_000)]
    norm = torch.nn.utils.get_total_norm([t.double() for t in tensors])
    torch.testing.assert_close(tensor_stats(tensors).total_norm, norm, rtol=1e-6, atol=0)


def test_counts_beyond_float_precision():
    """torch.histc stops counting at 2**24."""
    ones = torch.ones(2**24 + 3)
    stats = tensor_stats([ones])
    assert stats.histogram.sum() == stats.histogram[0, 127 * 8] == 2**24 + 3


def test_statistics_of_parameters_are_numbers():
    """No part of a graph: nothing has a backward here, and numpy() must work."""
    stats = tensor_stats(torch.nn.Linear(3, 2).parameters())
    assert not stats.total_norm.requires_grad
    assert stats.norm.numpy().shape == (2,)


def test_more_elements_than_an_int32_counts():
    """2**31 + 7 elements, nearly all on pages that were never touched: 4 GiB of addresses only."""
    x = torch.from_numpy(np.zeros(2**31 + 7, dtype=np.int16)).view(torch.bfloat16)
    x[-1] = 3.0
    x[2**31 - 1] = torch.inf
    stats = tensor_stats([x])
    assert stats.numel == 2**31 + 7
    assert stats.zeros == stats.histogram[0, 0] == 2**31 + 5
    assert stats.pos_infs == stats.histogram[0, 2040] == 1
    assert stats.max == torch.inf
    assert stats.histogram.sum() == 2**31 + 7


def test_one_huge_tensor_among_thousands_of_small(generator):
    sizes = [int(n) for n in torch.randint(1, 40, (3000,), generator=generator)]
    sizes[1500] = 3_000_001
    tensors = [torch.randn(n, generator=generator) for n in sizes]
    stats = tensor_stats(tensors)
    assert stats.numel.tolist() == sizes
    for index in (0, 1499, 1500, 1501, 2999):
        alone = tensor_stats([tensors[index]])
        assert torch.equal(stats.values[:, index], alone.values[:, 0])
        assert torch.equal(stats.histogram[index], alone.histogram[0])
    assert torch.equal(stats.histogram.sum(1), stats.numel)


def test_operator_keeps_torchs_contract(generator):
    tensors = [torch.randn(n, generator=generator) for n in (10, 30)]
    histogram = torch.zeros(2, BINS, dtype=torch.int64)
    torch.library.opcheck(torch.ops.pyvizllm.tensor_stats.default, (tensors, None))
    torch.library.opcheck(torch.ops.pyvizllm.tensor_stats.default, (tensors, histogram))


@pytest.mark.parametrize(
    ("tensors", "histogram", "error", "sentence"),
    [
        ([], True, ValueError, "at least one tensor, got an empty list"),
        ([torch.ones(2), 3.0], True, TypeError, "expected tensors, got float at position 1"),
        ([torch.ones(2).long()], True, TypeError, "float32.* got torch.int64 at position 0"),
        ([torch.eye(2).to_sparse()], True, TypeError, "dense tensors, got torch.sparse_coo"),
        ([torch.ones(2)], 7, TypeError, "a bool or an int64 tensor, got int"),
        (
            [torch.ones(2)],
            torch.zeros(2, BINS, dtype=torch.int64),
            ValueError,
            r"int64 of shape \[1, 4096\], got torch.int64 of shape \[2, 4096\]",
        ),
        ([torch.ones(2)], torch.zeros(1, BINS), ValueError, "got torch.float32"),
        (
            [torch.ones(2)],
            torch.zeros(1, 2 * BINS, dtype=torch.int64)[:, ::2],
            ValueError,
            "contiguous histogram",
        ),
        ([torch.ones(2), torch.ones(2, device="meta")], True, ValueError, "all tensors on cpu"),
        (torch.ones(2, 3), True, TypeError, "expected a list of tensors, got Tensor"),
        (None, True, TypeError, "expected a list of tensors, got NoneType"),
        ({"weight": torch.ones(2)}, True, TypeError, "expected tensors, got str at position 0"),
    ],
)
def test_errors_are_sentences(tensors, histogram, error, sentence):
    with pytest.raises(error, match=sentence):
        tensor_stats(tensors, histogram=histogram)
