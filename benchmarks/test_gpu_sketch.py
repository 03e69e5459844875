"""The sketch, and the search for NaN among healthy tensors: 1e9 float32 in 300 tensors."""

from __future__ import annotations

import pytest
import torch
from gpu_device import on_gpu
from test_gpu_tensor_stats import SIZES, data_of_kind

from pyvizllm.ops import first_nonfinite_, sketch, tensor_stats

pytestmark = on_gpu
NORM = "torch._foreach_norm"


def test_sketch(compare_gpu, gpu):
    tensors = data_of_kind("normal", gpu, SIZES, torch.float32)
    compare_gpu(
        "sketch, 1e9 float32 in 300 tensors",
        ("sketch", lambda: sketch(tensors)),
        {NORM: lambda: torch._foreach_norm(tensors)},
        moved=(sum(t.nbytes for t in tensors), "read"),
    )


@pytest.mark.parametrize("clock", ["device", "both"])
def test_search_that_finds_nothing(compare_gpu, gpu, clock):
    tensors = data_of_kind("normal", gpu, SIZES, torch.float32)
    counts = tensor_stats(tensors, histogram=False).counts
    found = torch.full((len(tensors),), -1, device=counts.device)
    compare_gpu(
        "search for NaN in 300 healthy tensors",
        ("first_nonfinite_", lambda: first_nonfinite_(tensors, counts, found)),
        {NORM: lambda: torch._foreach_norm(tensors)},
        clock=clock,
    )
