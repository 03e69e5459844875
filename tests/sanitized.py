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

from pyvizllm.ops import cross_entropy, tensor_stats

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


OPERATIONS: tuple[Callable[[str], list[Tensor]], ...] = (
    cross_entropy_everywhere,
    tensor_stats_everywhere,
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
