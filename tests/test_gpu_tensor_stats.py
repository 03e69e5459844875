"""tensor_stats on a GPU: the CPU's bits where they are exact, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, cuda_only, on_gpu
from gpu_runs import (
    bits_while_the_device_is_busy,
    on_a_side_stream,
    replayed,
    without_synchronisation,
)
from test_tensor_stats import KINDS, check, data_of_kind
from torch import Tensor

from pyvizllm.ops import BINS, tensor_stats

pytestmark = on_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 7, 4097, 65537, 1_000_003, 0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(47)  # the CPU's: both devices get the same numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_are_the_cpus_and_so_are_extremes(dtype, kind, generator):
    on_cpu = [data_of_kind(kind, size, dtype, generator) for size in SIZES]
    if dtype == torch.float16:  # which of the NaN bins its NaNs take is up to the hardware
        on_cpu = [tensor.nan_to_num(1.0, torch.inf, -torch.inf) for tensor in on_cpu]
    wanted = tensor_stats(on_cpu)
    stats = tensor_stats([tensor.to(DEVICE) for tensor in on_cpu])
    assert torch.equal(stats.histogram.cpu(), wanted.histogram)
    assert torch.equal(stats.counts.cpu(), wanted.counts)
    got = stats.values.cpu()
    torch.testing.assert_close(got[4:], wanted.values[4:], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[1:4], wanted.values[1:4], rtol=4e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_counted_as_on_the_cpu(dtype):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.int16).view(dtype)
    finite = patterns[~patterns.isnan()]
    wanted, stats = tensor_stats([finite]), tensor_stats([finite.to(DEVICE)])
    assert torch.equal(stats.histogram.cpu(), wanted.histogram)
    assert torch.equal(stats.counts.cpu(), wanted.counts)
    assert tensor_stats([patterns.to(DEVICE)]).nans == patterns.isnan().sum()


def test_more_tensors_than_one_launch_takes(generator):
    """3003 tensors of mixed dtypes, empties in between and last, one large among them."""
    sizes = [*(t % 7 for t in range(3000)), 3_000_001, 65537, 0]
    tensors = [
        torch.randn(size, generator=generator).to(DTYPES[index % 4]).to(DEVICE)
        for index, size in enumerate(sizes)
    ]
    stats = tensor_stats(tensors)
    assert stats.numel.tolist() == sizes
    picked = [*range(0, 3000, 71), 3000, 3001, 3002]
    check(tensor_stats([tensors[index] for index in picked]), [tensors[index] for index in picked])
    for position, index in enumerate(picked):
        alone = tensor_stats([tensors[index]])
        assert torch.equal(stats.histogram[index], alone.histogram[0]), position
        assert torch.equal(stats.values[:, index], alone.values[:, 0]), position


def test_tensors_at_every_alignment(generator):
    """A kernel reads 16 bytes at a time: each start, and each end, that is not a multiple of it."""
    for dtype in DTYPES:
        base = torch.randn(100_100, generator=generator).to(dtype).to(DEVICE)
        views = [base[start : 100_000 + end] for start in range(9) for end in (0, 1, 5)]
        check(tensor_stats(views), views)


def measured(sizes: tuple[int, ...] = SIZES, histogram: bool = True):
    """A function of nothing that computes statistics; its input and its outputs in fixed memory."""
    memory = torch.zeros(sum(sizes), device=DEVICE)
    tensors = list(memory.split(sizes))
    values = torch.zeros(7, len(sizes), dtype=torch.float64, device=DEVICE)
    norm = torch.zeros((), dtype=torch.float64, device=DEVICE)
    counts = torch.zeros(len(sizes), BINS, dtype=torch.int64, device=DEVICE)

    def run() -> None:
        counts.zero_()
        stats = tensor_stats(tensors, histogram=counts if histogram else False)
        values.copy_(stats.values)
        norm.copy_(stats.total_norm)

    outputs: tuple[Tensor, ...] = (values, norm, counts) if histogram else (values, norm)
    return run, memory, outputs


@cuda_only
@pytest.mark.parametrize("histogram", [True, False])
def test_nothing_waits_for_the_device(histogram):
    run, _, _ = measured(histogram=histogram)
    without_synchronisation(run)
    without_synchronisation(lambda: tensor_stats([torch.ones(70_000, device=DEVICE)]))


@cuda_only
def test_a_captured_graph_computes_on_new_inputs(generator):
    run, memory, outputs = measured()
    values = [data_of_kind(kind, len(memory), torch.float32, generator) for kind in KINDS[:4]]
    replayed(run, memory, [value.to(DEVICE) for value in values], outputs)


@cuda_only
def test_work_is_queued_on_the_current_stream(generator):
    run, memory, outputs = measured()
    on_a_side_stream(run, memory, torch.randn(memory.shape, device=DEVICE), outputs)


@cuda_only
def test_the_same_bits_in_20_runs_beside_other_work():
    run, memory, outputs = measured((3_000_001, 5, 0, 40_000_000, 70_000))
    memory.normal_()
    bits_while_the_device_is_busy(run, outputs)


@cuda_only
def test_gradients_at_new_addresses_are_measured_there():
    """What is kept from call to call (a table of pointers) must not outlive the tensors."""
    kept = []
    for step in range(6):
        tensors = [torch.full((n,), float(step), device=DEVICE) for n in (1000, 70_000)]
        kept.append(tensors[0])  # so that the next step's lie elsewhere
        stats = tensor_stats(tensors)
        assert stats.max.tolist() == [step, step]
        assert stats.numel.tolist() == [1000, 70_000]


@cuda_only
def test_more_than_2_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 10e9:
        pytest.skip(f"expected 10 GB of free GPU memory, got {free / 1e9:.0f}")
    x = torch.zeros(2**31 + 7, dtype=torch.bfloat16, device=DEVICE)
    x[-1], x[2**31 - 1], x[2**31] = 3.0, torch.inf, -2.0
    stats = tensor_stats([x[:5], x])
    assert stats.numel[1] == 2**31 + 7
    assert stats.zeros[1] == stats.histogram[1, 0] == 2**31 + 4
    assert stats.pos_infs[1] == stats.histogram[1, 2040] == 1
    assert (stats.min[1], stats.max[1]) == (-2.0, torch.inf)
    assert stats.histogram[1].sum() == 2**31 + 7
    del x
    torch.cuda.empty_cache()


@cuda_only
def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("expected two CUDA devices, got one")
    tensors = [torch.ones(70_000, device="cuda:1")]
    stats = tensor_stats(tensors)
    assert stats.total_norm.device == tensors[0].device
    check(stats, tensors)


@cuda_only
def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="expected all tensors on cuda:0, got cpu at position 1"):
        tensor_stats([torch.ones(3, device="cuda:0"), torch.ones(3)])
