"""The tests of the sketch and of the search for NaN once more, with the CUDA kernels.

As test_cuda_on_cpu.py does for the other operations: same inputs, same tolerances.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_sketch as on_cpu
import torch
from cuda_on_cpu.emulator import Kernels
from test_first_nonfinite import (  # noqa: F401 - collected here, where the fixtures replace kernels
    test_a_list_of_thousands,
    test_each_place_that_a_chunk_has,
    test_mixed_list,
    test_the_first_step_stays,
)
from test_sketch import (  # noqa: F401
    test_definition,
    test_it_is_linear,
    test_mixed_list_with_empties_views_and_seeds,
    test_nan_and_inf_show,
)

from pyvizllm.ops import first_nonfinite_, sketch, tensor_stats


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def cuda_kernels(kernels: Kernels) -> Iterator[None]:
    kernels.schedule("forward")
    with kernels.installed():
        yield


def test_any_order_of_threads_and_blocks_gives_the_same_bits(kernels):
    """More tensors than one table holds, empty ones at its end; and several that are not finite."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(70, generator=generator) for _ in range(798)]
    tensors += [torch.empty(0), torch.empty(0), torch.randn(70_000, generator=generator)]
    tensors[3][50:] = torch.nan
    tensors[-1][40_000:] = torch.inf
    results = []
    for order, workers in (("forward", 1), ("shuffled", 3)):
        kernels.schedule(order, workers)
        found = torch.full((len(tensors),), -1)
        first_nonfinite_(tensors, tensor_stats(tensors).counts, found)
        results.append((sketch(tensors), found))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    assert results[0][1].unique().tolist() == [-1, 50, 40_000]
    numbers, magnitudes = on_cpu.reference(tensors[700], 700)
    assert (abs(results[0][0][700].numpy() - numbers) <= on_cpu.FLOAT_ERROR * magnitudes).all()
    assert torch.equal(results[0][0][798:800], torch.zeros(2, 64, dtype=torch.float64))
