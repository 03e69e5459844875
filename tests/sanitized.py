"""A small set of calls of every operation, for compute-sanitizer: one process, one tool.

Shapes reach every path of the kernels once: rows shorter than a vector, rows that are no multiple
of one and start at any alignment, rows of one tile, of many, and longer than a block holds; more
rows than blocks; lists with empty tensors, of mixed dtypes. Results are compared with the CPU's: an
instrumented kernel that was not launched finds no error either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyvizllm import AdamW, clip_grad_norm_
from pyvizllm.ops import cross_entropy, first_nonfinite_, sketch, tensor_stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 10), (5, 33), (2, 4099), (2, 50257), (80, 140001), (4500, 9), (900, 4099))
MODES = ({}, {"fused": True}, {"fused": True, "inplace": True})
SIZES = (0, 5, 4097, 65537, 0, 140_001, 0)


def cross_entropy_everywhere(device: str) -> list[Tensor]:
    """Losses, metrics and gradients of a view that starts one element into its memory."""
    results: list[Tensor] = []
    for index, (rows, classes) in enumerate(SHAPES):
        dtype = DTYPES[index % len(DTYPES)] if classes > 9 else torch.bfloat16
        generator = torch.Generator().manual_seed(index)
        base = torch.randn(rows, classes + 3, generator=generator).to(dtype).to(device)
        target = torch.randint(classes, (rows,), generator=generator).to(device)
        target[0] = -100
        for mode in MODES:
            plain = cross_entropy(base[:, :classes].clone(), target, **mode)  # other kernels
            leaf = base.clone().requires_grad_()
            loss, metrics = cross_entropy(
                (leaf * 1.0)[:, 1 : classes + 1],
                target.int() if index % 2 else target,
                label_smoothing=0.1,
                z_loss=1e-3,
                return_metrics=True,
                **mode,
            )
            loss.backward()
            assert leaf.grad is not None
            results += [plain, loss.detach(), metrics.sums, leaf.grad]
    return results


def cross_entropy_with_options_everywhere(device: str) -> list[Tensor]:
    """Cap, scale, class weights, smoothing and records: of indices, and of probabilities."""
    results: list[Tensor] = []
    for index, (rows, classes) in enumerate(SHAPES[:5]):
        dtype = DTYPES[index % len(DTYPES)]
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(rows, classes + 3, generator=generator).to(dtype)[:, 1 : classes + 1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.rand(classes, generator=generator).to(wide).to(device)
        probabilities = torch.rand(rows, classes, generator=generator).to(dtype)
        for target in (torch.arange(rows) % classes, probabilities):
            options = (-100, 0.1, 1e-3, 20.0, 0.7, 0, "mean")
            loss, gradient, sums, _ = torch.ops.pyvizllm.cross_entropy_fused(
                x.to(device), target.to(device), weight, *options, 2
            )
            results += [loss, gradient, sums[:2]]
            first = (x.to(device), target.to(device), weight)
            _, row_max, row_sum, _, _ = torch.ops.pyvizllm.cross_entropy_forward(
                *first, *options, 0
            )
            upstream = torch.ones((), dtype=wide, device=device)
            results.append(
                torch.ops.pyvizllm.cross_entropy_backward(
                    upstream, *first, row_max, row_sum, *options
                )
            )
    return results


def tensor_stats_everywhere(device: str) -> list[Tensor]:
    """Statistics and histograms of every dtype, and of one constant tensor."""
    generator = torch.Generator().manual_seed(7)
    tensors = [
        torch.randn(size, generator=generator).to(dtype).to(device)
        for dtype in DTYPES
        for size in SIZES
    ]
    tensors += [torch.full((70_001,), 0.37, device=device), torch.zeros(70_001, device=device)]
    stats, without = tensor_stats(tensors), tensor_stats(tensors, histogram=False)
    assert stats.histogram is not None
    return [stats.values[1:4], stats.counts, stats.total_norm, stats.histogram, without.counts]


def adamw_everywhere(device: str) -> list[Tensor]:
    """Steps of every dtype, then of bfloat16 with float32 moments and master weights."""
    results: list[Tensor] = []
    for index, dtype in enumerate((*DTYPES, torch.bfloat16)):
        generator = torch.Generator().manual_seed(index)
        parameters = [
            torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype).to(device))
            for size in SIZES
        ]
        wide = torch.float32 if index == len(DTYPES) else None
        optimizer = AdamW(
            parameters, eps=1e-4, amsgrad=index % 2 == 0, moments_dtype=wide, master_weights=True
        )
        for step in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(device)
            if step > 0:
                optimizer.collect(grad=True, histograms=step == 2)
            optimizer.step()
        collected = optimizer.collected
        assert collected is not None
        assert collected.update is not None
        assert collected.grad is not None
        results += [p.detach() for p in parameters]
        results += [t for p in parameters for t in optimizer.state[p].values()]
        results += [collected.update.norm, collected.update.numel, collected.grad.counts]
    return results


def clip_grad_norm_everywhere(device: str) -> list[Tensor]:
    """Gradients of every dtype at odd addresses; and the rows of a matrix that lie apart."""
    generator = torch.Generator().manual_seed(11)
    parameters = []
    for dtype in DTYPES:
        for size in SIZES:
            gradient = torch.randn(2, size, generator=generator).to(dtype).to(device)
            parameters.append(torch.nn.Parameter(torch.zeros_like(gradient[0])))
            parameters[-1].grad = gradient[1]
    norm = clip_grad_norm_(parameters, 1.0)
    matrix = torch.randn(1003, 131, generator=generator).to(device)
    factor = torch.full((), 0.3, dtype=torch.float64, device=device)
    torch.ops.pyvizllm.scale_([matrix[:, 1:130]], factor)
    return [norm, matrix, *(p.grad for p in parameters if p.grad is not None)]


def sketch_everywhere(device: str) -> list[Tensor]:
    """Sketches of every dtype, and the places of a NaN and an Inf."""
    generator = torch.Generator().manual_seed(13)
    tensors = [
        torch.randn(size, generator=generator).to(dtype).to(device)
        for dtype in DTYPES
        for size in SIZES
    ]
    sketches = sketch(tensors)
    tensors[5][100_000:] = torch.nan
    tensors[10][3] = torch.inf
    found = torch.full((len(tensors),), -1, device=device)
    first_nonfinite_(tensors, tensor_stats(tensors).counts, found, row=2)
    return [sketches, found]


OPERATIONS: tuple[Callable[[str], list[Tensor]], ...] = (
    cross_entropy_everywhere,
    cross_entropy_with_options_everywhere,
    tensor_stats_everywhere,
    adamw_everywhere,
    clip_grad_norm_everywhere,
    sketch_everywhere,
)


def main(device: str) -> None:
    for operation in OPERATIONS:
        results = [result.cpu() for result in operation(device)]
        for got, wanted in zip(results, operation("cpu"), strict=True):
            rtol, atol = (2e-2, 2e-3) if got.is_floating_point() else (0, 0)
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
        print(f"{operation.__name__}: {len(results)} results agree with the CPU's", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cuda"])
