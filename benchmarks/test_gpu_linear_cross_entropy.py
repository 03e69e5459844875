"""linear_cross_entropy on a GPU against its three matrix products alone, and against torch's.

8192 x 4096 x 128256 in bfloat16: a batch of a model as wide as Llama-3-8B, and its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu_device import on_gpu
from torch import Tensor

from pyvizllm import linear_cross_entropy

pytestmark = on_gpu

TOKENS, FEATURES, CLASSES = 8192, 4096, 128256


class Layer:
    """Hidden states, the layer's weight, targets, and room for what the three products make."""

    def __init__(self, gpu) -> None:
        self.tokens, self.classes = gpu.size(TOKENS), gpu.size(CLASSES)
        features = FEATURES if gpu.device == "cuda" else 16
        new = {"device": gpu.device, "dtype": torch.bfloat16}
        self.input = torch.randn(self.tokens, features, **new).requires_grad_()
        self.weight = torch.randn(self.classes, features, **new).mul_(0.02).requires_grad_()
        self.target = torch.randint(self.classes, (self.tokens,), device=gpu.device)

    def step(self, function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            self.input.grad = self.weight.grad = None
            function(self.input, self.weight, self.target).backward()

        return run

    def products(self) -> Callable[[], None]:
        """Logits, gradient of the input, gradient of the weight, over all tokens at once."""
        x, w = self.input.detach(), self.weight.detach()
        logits = x @ w.T
        of_input, of_weight = torch.empty_like(x), torch.empty_like(w)

        def run() -> None:
            torch.mm(x, w.T, out=logits)
            torch.mm(logits, w, out=of_input)
            torch.mm(logits.T, x, out=of_weight)

        return run


def plain(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


@pytest.fixture
def layer(gpu) -> Layer:
    return Layer(gpu)


def test_forward_and_backward(compare_gpu, layer):
    compare_gpu(
        f"linear_cross_entropy forward+backward {TOKENS}x{FEATURES}x{CLASSES} bfloat16",
        ("chunked", layer.step(linear_cross_entropy)),
        {
            "the three products alone": layer.products(),
            "F.linear + F.cross_entropy": layer.step(plain),
        },
        rounds=9,
        target={
            "the three products alone": "at most 1.1x their time (0.91x)",
            "F.linear + F.cross_entropy": "1x",
        },
    )
