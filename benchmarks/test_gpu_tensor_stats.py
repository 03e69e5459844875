"""tensor_stats on a GPU against one norm a tensor, and against what people run today.

1e9 elements in 300 tensors, as a model of that size has them: 100 vectors of 2048, 100 matrices of
1536 x 1536, 99 of 1536 x 4096 and an embedding that takes the rest.
"""

from __future__ import annotations

import pytest
import torch
from gpu_device import on_gpu
from gpu_timing import Gpu
from torch import Tensor
from ways import watch_as_wandb_does

from pyvizllm.ops import tensor_stats

pytestmark = on_gpu

BODY = [2048] * 100 + [1536 * 1536] * 100 + [1536 * 4096] * 99
SIZES = [*BODY, 10**9 - sum(BODY)]
NORM = "torch._foreach_norm (norms only)"
DTYPES = [torch.float32, torch.bfloat16]


def data_of_kind(kind: str, gpu: Gpu, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """One gradient a size, each in memory of its own."""
    tensors = []
    for size in map(gpu.size, sizes):
        x = torch.randn(size, device=gpu.device, dtype=dtype) * 1e-4
        if kind == "zero":
            x.zero_()
        elif kind == "constant":
            x.fill_(-0.37)
        elif kind == "heavy-tailed":  # from 1e-12 to 1e4 and further
            x *= torch.exp(6 * torch.randn(size, device=gpu.device, dtype=dtype))
        tensors.append(x)
    return tensors


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("histogram", [True, False], ids=["histograms", "no histograms"])
@pytest.mark.parametrize("kind", ["normal", "zero", "constant", "heavy-tailed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_a_model_of_1e9(compare_gpu, gpu, dtype, kind, histogram):
    tensors = data_of_kind(kind, gpu, SIZES, dtype)
    what = "statistics and histograms" if histogram else "statistics"
    percent = 85 if dtype == torch.float32 else 65
    compare_gpu(
        f"{what}, 1e9 {str(dtype).removeprefix('torch.')} in 300 tensors, {kind}",
        ("tensor_stats", lambda: tensor_stats(tensors, histogram=histogram)),
        {NORM: lambda: torch._foreach_norm(tensors)},
        moved=(bytes_of(tensors), "read"),
        target={NORM: f"no slower; {percent} % of read"} if histogram else None,
    )


@pytest.mark.parametrize("histogram", [True, False], ids=["histograms", "no histograms"])
@pytest.mark.parametrize("clock", ["both", "host"])
def test_many_small_tensors(compare_gpu, gpu, clock, histogram):
    """What is to be shown here is the cost of a call: the data fit the cache, and may lie there."""
    tensors = data_of_kind("normal", gpu, [10_000] * 1000, torch.float32)
    what = "statistics and histograms" if histogram else "statistics"
    compare_gpu(
        f"{what}, 1000 tensors of 10000 f32, {'host and device' if clock == 'both' else 'host'}",
        ("tensor_stats", lambda: tensor_stats(tensors, histogram=histogram)),
        {NORM: lambda: torch._foreach_norm(tensors)},
        clock=clock,
        rounds=51,
        target={NORM: "3x; 100 us"} if clock == "both" else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_against_wandbs_way(compare_gpu, gpu, dtype):
    tensors = data_of_kind("normal", gpu, SIZES, dtype)
    compare_gpu(
        f"statistics and histograms, 1e9 {str(dtype).removeprefix('torch.')} in 300 tensors",
        ("tensor_stats", lambda: tensor_stats(tensors)),
        {"wandb.watch's way": lambda: watch_as_wandb_does(tensors)},
        clock="both",
        rounds=5,
        target={"wandb.watch's way": "50x"},
    )


def test_against_tensorboardx(compare_gpu, gpu, tmp_path):
    """15 of the 300 tensors: each is copied to the host and sorted into bins there, for seconds."""
    tensorboardx = pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    tensors = data_of_kind("normal", gpu, BODY[::20], torch.float32)
    writer = tensorboardx.SummaryWriter(str(tmp_path))

    def add_histograms() -> None:
        for index, tensor in enumerate(tensors):
            writer.add_histogram(f"grad/{index}", tensor, 0)

    compare_gpu(
        f"statistics and histograms, {sum(BODY[::20]):.1e} f32 in 15 tensors",
        ("tensor_stats", lambda: tensor_stats(tensors)),
        {"tensorboardX add_histogram": add_histograms},
        clock="both",
        rounds=3,
        target={"tensorboardX add_histogram": "500x"},
    )
    writer.close()
