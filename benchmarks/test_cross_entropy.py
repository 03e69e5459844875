"""cross_entropy forward and backward against eager torch and torch.compile.

2048 x 32000: a batch of 2048 tokens and a Llama-2 vocabulary; 262 MB of float32 logits, more than
any cache. The logits come from a stand-in for the model that keeps the gradient it is given, so
every way is timed from the same logits to the same gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from ways import compiled_cross_entropy, loss_only, step

from pyvizllm.ops import cross_entropy

# Dynamo looks at the .grad of every input, and torch warns of that for logits.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

ROWS, CLASSES = 2048, 32000


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def batch(request) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=generator).to(request.param)
    return logits, torch.randint(CLASSES, (ROWS,), generator=generator)


def test_fused_in_place(compare, batch):
    logits, target = batch
    name = str(logits.dtype).removeprefix("torch.")
    # Overwritten logits are smaller from call to call; the work does not depend on the values.
    compare(
        f"cross_entropy forward+backward {ROWS}x{CLASSES} {name}, in place",
        (
            "fused, inplace",
            step(cross_entropy, logits.clone(), target, fused=True, inplace=True),
        ),
        {
            "F.cross_entropy": step(F.cross_entropy, logits, target),
            "torch.compile": step(compiled_cross_entropy(), logits, target),
        },
        target={"F.cross_entropy": "10x" if logits.dtype == torch.float32 else "7x"},
    )


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["recompute", "fused"])
def test_new_gradient_tensor(compare, batch, options):
    logits, target = batch
    name = str(logits.dtype).removeprefix("torch.")
    compare(
        f"cross_entropy forward+backward {ROWS}x{CLASSES} {name}, new gradient",
        ("fused" if options else "recompute", step(cross_entropy, logits, target, **options)),
        {
            "F.cross_entropy": step(F.cross_entropy, logits, target),
            "torch.compile": step(compiled_cross_entropy(), logits, target),
        },
        target={"F.cross_entropy": "2.5x" if logits.dtype == torch.float32 else "2x"},
    )


def test_metrics_from_the_same_read(compare, batch):
    logits, target = batch
    name = str(logits.dtype).removeprefix("torch.")
    compare(
        f"the same {name}, in place, with all metrics",
        (
            "return_metrics",
            step(loss_only, logits.clone(), target, fused=True, inplace=True),
        ),
        {
            "without metrics": step(
                cross_entropy, logits.clone(), target, fused=True, inplace=True
            ),
        },
    )


# Below pyvizllm.ops, so that each row is the kernel's own time: what an option costs.
def fused_in_place(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options):
    def run() -> None:
        torch.ops.pyvizllm.cross_entropy_fused_(
            logits,
            target,
            weight,
            -100,
            options.get("label_smoothing", 0.0),
            options.get("z_loss", 0.0),
            options.get("softcap", 0.0),
            options.get("logit_scale", 1.0),
            0,
            "mean",
            options.get("wanted", 0),
        )

    return run


OPTIONS = ("label_smoothing", "class weights", "probabilities", "z_loss", "softcap", "metrics")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [(2048, 32000), (512, 128256)], ids=["32000", "128256"])
def test_option_against_the_plain_case(compare, shape, dtype, option):
    generator = torch.Generator().manual_seed(0)
    rows, classes = shape
    logits = torch.randn(shape, generator=generator).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    plain = fused_in_place(logits.clone(), target)
    ways = {
        "label_smoothing": ((), {"label_smoothing": 0.1}),
        "class weights": ((torch.rand(classes, generator=generator),), {}),
        "probabilities": ((), {}),
        "z_loss": ((), {"z_loss": 1e-4}),
        "softcap": ((), {"softcap": 30.0}),
        "metrics": ((), {"wanted": 1}),
    }
    if option == "probabilities":
        target = torch.rand(shape, generator=generator).to(dtype)
        target /= target.sum(1, keepdim=True)
    positional, keywords = ways[option]
    # The others' time over ours: 1/1.3 = 0.77.
    compare(
        f"cross_entropy {rows}x{classes} {str(dtype).removeprefix('torch.')}, in place, {option}",
        (option, fused_in_place(logits.clone(), target, *positional, **keywords)),
        {"plain": plain},
        target={"plain": "0.91x" if option == "metrics" else "0.77x"},
    )
