"""AdamW and gradient clipping on a GPU against torch's, on the parameters of a model of 1e9.

The 300 tensors of benchmarks/test_gpu_tensor_stats.py. A step reads parameter, gradient and both
moments and writes all but the gradient. Both sides step one set of parameters: with a second one,
float32 would not fit the memory that a benchmark may take.
"""

from __future__ import annotations

import functools

import pytest
import torch
from gpu_device import on_gpu
from gpu_timing import Gpu
from test_gpu_tensor_stats import SIZES, bytes_of, data_of_kind
from torch.nn import Parameter

from pyvizllm import AdamW, clip_grad_norm_

pytestmark = on_gpu

TORCH = "torch.optim.AdamW(fused=True)"
CLIP = "torch's clip_grad_norm_"
DTYPES = [torch.float32, torch.bfloat16]
COLLECT = {
    "nothing": None,
    "statistics": {"histograms": False},
    "statistics and histograms": {"histograms": True},
}
LR = 1e-5


def parameters_of(gpu: Gpu, sizes: list[int], dtype: torch.dtype) -> list[Parameter]:
    """With their gradients: 8 GB in float32, and the moments take as much again."""
    parameters = [Parameter(x) for x in data_of_kind("normal", gpu, sizes, dtype)]
    for p, gradient in zip(parameters, data_of_kind("normal", gpu, sizes, dtype), strict=True):
        p.grad = gradient
    return parameters


def bytes_of_step(parameters: list[Parameter], moment: torch.dtype) -> int:
    """Read: parameter, gradient and two moments; written: all but the gradient."""
    return sum(p.numel() * (3 * p.element_size() + 4 * moment.itemsize) for p in parameters)


@pytest.mark.parametrize("collect", COLLECT)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_a_model_of_1e9(compare_gpu, gpu, dtype, collect):
    """Moments of float32, also of bfloat16 parameters: torch's fused step has none of those, and
    moves 4 bytes of moments an element where ours moves 8."""
    parameters = parameters_of(gpu, SIZES, dtype)
    ours = AdamW(parameters, lr=LR, moments_dtype=torch.float32)
    wanted = COLLECT[collect]
    if wanted is not None:
        ours.collect(**wanted)
    fused = torch.optim.AdamW(parameters, lr=LR, fused=True)
    compare_gpu(
        f"AdamW, 1e9 {str(dtype).removeprefix('torch.')}, moments of f32, collecting {collect}",
        ("AdamW", ours.step),
        {TORCH: fused.step},
        moved=(bytes_of_step(parameters, torch.float32), "copy"),
        target={TORCH: "no slower; 85 % of copy"} if collect == "nothing" else None,
    )


def test_bfloat16_moments(compare_gpu, gpu):
    """The same bytes on both sides."""
    parameters = parameters_of(gpu, SIZES, torch.bfloat16)
    compare_gpu(
        "AdamW, 1e9 bfloat16, moments of bf16, collecting nothing",
        ("AdamW", AdamW(parameters, lr=LR).step),
        {TORCH: torch.optim.AdamW(parameters, lr=LR, fused=True).step},
        moved=(bytes_of_step(parameters, torch.bfloat16), "copy"),
    )


@pytest.mark.parametrize("clock", ["both", "host"])
def test_many_small_tensors(compare_gpu, gpu, clock):
    """What is to be shown here is the cost of a call."""
    parameters = parameters_of(gpu, [10_000] * 1000, torch.float32)
    compare_gpu(
        f"AdamW, 1000 tensors of 10000 f32, {'host and device' if clock == 'both' else 'host'}",
        ("AdamW", AdamW(parameters, lr=LR).step),
        {TORCH: torch.optim.AdamW(parameters, lr=LR, fused=True).step},
        clock=clock,
        rounds=51,
    )


@pytest.mark.parametrize("clipped", [True, False], ids=["clipped", "within the norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_clipping_a_model_of_1e9(compare_gpu, gpu, dtype, clipped):
    """Where nothing is to be clipped torch multiplies by 1, and ours ends after the norm."""
    parameters = parameters_of(gpu, SIZES, dtype)
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A NaN makes the coefficient NaN, hence other than 1, whatever was multiplied before.
    if clipped:
        gradients[0][0] = torch.nan
    clips = {"clip_grad_norm_": clip_grad_norm_, CLIP: torch.nn.utils.clip_grad_norm_}
    ways = {name: functools.partial(clip, parameters, 1e9) for name, clip in clips.items()}
    compare_gpu(
        f"clip_grad_norm_, 1e9 {str(dtype).removeprefix('torch.')} in 300 tensors, "
        f"{'clipped' if clipped else 'within the norm'}",
        ("clip_grad_norm_", ways["clip_grad_norm_"]),
        {CLIP: ways[CLIP]},
        moved=(bytes_of(gradients) * (3 if clipped else 1), "copy" if clipped else "read"),
    )
