"""cross_entropy on a GPU against eager torch, torch.compile and Liger-Kernel, and its memory.

Classes: 1000 (small rows), 16384, 32000 (Llama 2), 50257 (GPT-2: odd, so that rows start at any
alignment), 128256 (Llama 3), 262144 (Gemma 3). Rows as a micro-batch has them. The bytes of a case
are those it cannot do without: a fused step reads the logits and writes the gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu_device import on_gpu
from gpu_timing import Gpu, in_turn
from torch import Tensor
from ways import backward_of, compiled_cross_entropy, loss_of, step

from pyvizllm.ops import cross_entropy

pytestmark = [*on_gpu, pytest.mark.filterwarnings("ignore")]  # others' code, on any version

BF16, F32 = torch.bfloat16, torch.float32
LARGE = [
    (8192, 16384, BF16),
    (8192, 32000, BF16),
    (8192, 50257, BF16),
    (8192, 128256, BF16),
    (4096, 262144, BF16),
    (8192, 32000, F32),
    (4096, 128256, F32),
]
SMALL = [(32768, 1000, BF16), (32768, 1000, F32)]
COMPILED = {(8192, 32000, BF16), (8192, 128256, BF16), (8192, 32000, F32), *SMALL}
"""Compiling takes seconds a shape: not all of them."""
COPY = "85 % of copy"
FORWARD = "88 % of copy"
BACKWARD = "88 % of copy"
SMALL_ROWS = "75 % of copy"


def named(shape: tuple[int, int, torch.dtype]) -> str:
    rows, classes, dtype = shape
    return f"{rows}x{classes} {str(dtype).removeprefix('torch.')}"


class Batch:
    """Logits in buffers that are gone through in turn, and their targets."""

    def __init__(self, gpu: Gpu, shape: tuple[int, int, torch.dtype]) -> None:
        self.gpu = gpu
        self.shape, self.name = shape, named(shape)
        self.rows, self.classes, self.dtype = gpu.size(shape[0]), gpu.size(shape[1]), shape[2]
        self.target = torch.randint(self.classes, (self.rows,), device=gpu.device)
        self.logits = gpu.buffers(self.make)
        self.bytes = self.logits[0].nbytes  # of one read or one write

    def make(self) -> Tensor:
        return torch.randn(self.rows, self.classes, device=self.gpu.device, dtype=self.dtype)

    def over(self, make: Callable, function: Callable, **options: object) -> Callable[[], object]:
        """make(function, logits, target) for all buffers, in turn."""
        return in_turn([make(function, x, self.target, **options) for x in self.logits])

    def in_place(self, make: Callable, function: Callable, **options: object) -> Callable:
        """The same over buffers of its own, whose logits are overwritten.

        They are smaller from call to call; the work does not depend on the values.
        """
        overwritten = [x.clone() for x in self.logits]
        return in_turn([make(function, x, self.target, **options) for x in overwritten])


@pytest.fixture(params=LARGE, ids=named)
def large(request, gpu) -> Batch:
    return Batch(gpu, request.param)


def others(batch: Batch, make: Callable) -> dict[str, Callable[[], object]]:
    """What a user would otherwise run."""
    ways = {"F.cross_entropy": batch.over(make, F.cross_entropy)}
    if batch.shape in COMPILED:
        backend = "inductor" if batch.gpu.device == "cuda" else "eager"
        ways["torch.compile"] = batch.over(make, compiled_cross_entropy(backend))
    return ways


def liger(batch: Batch) -> dict[str, Callable[[], object]]:
    """Liger-Kernel writes the gradient over the logits, too; nothing where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers.functional import liger_cross_entropy

    return {"Liger-Kernel": batch.in_place(step, liger_cross_entropy)}


STEP_TARGETS = {"F.cross_entropy": "5x", "torch.compile": "2.5x", "Liger-Kernel": "2.5x"}


def asked(fraction: str) -> dict[str, str]:
    return {name: f"{ratio}; {fraction}" for name, ratio in STEP_TARGETS.items()}


def test_fused_step_in_place(compare_gpu, large):
    compare_gpu(
        f"cross_entropy forward+backward {large.name}, in place",
        ("fused, inplace", large.in_place(step, cross_entropy, fused=True, inplace=True)),
        {**others(large, step), **liger(large)},
        moved=(2 * large.bytes, "copy"),
        target=asked(COPY),
    )


def test_fused_step_new_gradient(compare_gpu, large):
    compare_gpu(
        f"cross_entropy forward+backward {large.name}, new gradient",
        ("fused", large.over(step, cross_entropy, fused=True)),
        {
            "recompute": large.over(step, cross_entropy),
            "F.cross_entropy": large.over(step, F.cross_entropy),
        },
        moved=(2 * large.bytes, "copy"),
        target={"F.cross_entropy": f"5x; {COPY}"},
    )


@pytest.mark.parametrize("options", [{}, {"inplace": True}], ids=["new gradient", "in place"])
def test_fused_kernel(compare_gpu, large, options):
    """The forward call of the fused mode by itself: it has written the gradient when it returns."""
    buffers = large.in_place if options else large.over
    compare_gpu(
        f"cross_entropy fused kernel {large.name}, {'in place' if options else 'new gradient'}",
        ("fused forward", buffers(loss_of, cross_entropy, fused=True, **options)),
        {"F.cross_entropy, forward": large.over(loss_of, F.cross_entropy)},
        moved=(2 * large.bytes, "copy"),
        target={"F.cross_entropy, forward": COPY},
    )


def without_graph(function: Callable, logits: Tensor, target: Tensor) -> Callable[[], Tensor]:
    return lambda: function(logits, target)


def test_forward(compare_gpu, large):
    compare_gpu(
        f"cross_entropy forward {large.name}",
        ("recompute", large.over(without_graph, cross_entropy)),
        {"F.cross_entropy": large.over(without_graph, F.cross_entropy)},
        moved=(large.bytes, "copy"),
        target={"F.cross_entropy": FORWARD},
    )


def test_backward(compare_gpu, large):
    compare_gpu(
        f"cross_entropy backward {large.name}",
        ("recompute", large.over(backward_of, cross_entropy)),
        {"F.cross_entropy": large.over(backward_of, F.cross_entropy)},
        moved=(2 * large.bytes, "copy"),
        target={"F.cross_entropy": BACKWARD},
    )


@pytest.mark.parametrize("shape", SMALL, ids=named)
def test_small_rows(compare_gpu, gpu, shape):
    batch = Batch(gpu, shape)
    compare_gpu(
        f"cross_entropy forward+backward {batch.name}, in place",
        ("fused, inplace", batch.in_place(step, cross_entropy, fused=True, inplace=True)),
        {**others(batch, step), **liger(batch)},
        moved=(2 * batch.bytes, "copy"),
        target=asked(SMALL_ROWS),
    )
    compare_gpu(
        f"cross_entropy fused kernel {batch.name}, in place",
        ("fused forward", batch.in_place(loss_of, cross_entropy, fused=True, inplace=True)),
        {"F.cross_entropy, forward": batch.over(loss_of, F.cross_entropy)},
        moved=(2 * batch.bytes, "copy"),
        target={"F.cross_entropy, forward": SMALL_ROWS},
    )
    compare_gpu(
        f"cross_entropy forward {batch.name}",
        ("recompute", batch.over(without_graph, cross_entropy)),
        {"F.cross_entropy": batch.over(without_graph, F.cross_entropy)},
        moved=(batch.bytes, "copy"),
        target={"F.cross_entropy": SMALL_ROWS},
    )
