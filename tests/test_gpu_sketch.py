"""The sketch and the search for NaN on a GPU: the CPU's tests, and what only a GPU can show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_device import DEVICE, on_gpu
from test_first_nonfinite import (  # noqa: F401 - collected here, where the fixture names the device
    test_each_place_that_a_chunk_has,
    test_the_first_step_stays,
)

from pyvizllm.ops import first_nonfinite_, sketch, tensor_stats

pytestmark = on_gpu


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def test_the_cpus_sketch_and_the_same_bits_in_20_runs():
    generator = torch.Generator("cpu").manual_seed(1)
    tensors = [
        torch.randn(size, generator=generator, device="cpu").to(dtype)
        for size in (0, 5, 64, 40_000, 3_000_001)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    there = [tensor.to(DEVICE) for tensor in tensors]
    first = sketch(there)
    for _ in range(20):
        assert torch.equal(sketch(there), first)
    # float32 sums in another order: a chunk's share of a number is some 20 elements wide.
    torch.testing.assert_close(first.cpu(), sketch(tensors), rtol=1e-4, atol=1e-3)


def test_nothing_waits():
    tensors = [torch.ones(100_000), torch.full((7,), torch.nan)]
    found = torch.full((2,), -1, dtype=torch.int64)
    counts = tensor_stats(tensors).counts
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        sketch(tensors)
        first_nonfinite_(tensors, counts, found)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == [-1, 0]
