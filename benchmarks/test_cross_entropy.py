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
