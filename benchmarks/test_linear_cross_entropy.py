"""linear_cross_entropy forward and backward against torch's, with all logits and chunked.

2048 x 768 x 50257: a batch of 2048 tokens, and GPT-2's width and vocabulary; 412 MB of float32
logits, and 154 MB of gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_bytes
from torch import Tensor

from pyvizllm.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, FEATURES, CLASSES = 2048, 768, 50257


def plain(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def torch_chunked(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(input, weight, target, options=options)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def layer(request) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(TOKENS, FEATURES, generator=generator).to(request.param)
    weight = torch.randn(CLASSES, FEATURES, generator=generator).mul(0.02).to(request.param)
    target = torch.randint(CLASSES, (TOKENS,), generator=generator)
    return input.requires_grad_(), weight.requires_grad_(), target


def step(function: Callable[..., Tensor], layer: tuple[Tensor, Tensor, Tensor]):
    input, weight, _ = layer

    def run() -> None:
        input.grad = weight.grad = None
        function(*layer).backward()

    return run


def test_forward_and_backward(compare, layer):
    name = str(layer[0].dtype).removeprefix("torch.")
    compare(
        f"linear_cross_entropy forward+backward {TOKENS}x{FEATURES}x{CLASSES} {name}",
        ("chunked", step(linear_cross_entropy, layer)),
        {
            "F.linear + F.cross_entropy": step(plain, layer),
            "F.linear_cross_entropy, chunked": step(torch_chunked, layer),
        },
        rounds=5,
        target={"F.linear + F.cross_entropy": "1x", "F.linear_cross_entropy, chunked": "1x"},
    )


def test_memory_beside_the_gradients(layer):
    input, weight, _ = layer
    gradients = (input.numel() + weight.numel()) * input.itemsize

    def extra(function: Callable[..., Tensor]) -> float:
        input.grad = weight.grad = None
        return (peak_bytes(step(function, layer)) - gradients) / 1e6

    ours, all_logits, chunked = map(extra, (linear_cross_entropy, plain, torch_chunked))
    print(f"\n{input.dtype}, beside the gradients: {ours:.1f} MB, F.linear + F.cross_entropy "
          f"{all_logits:.1f} MB, F.linear_cross_entropy {chunked:.1f} MB")  # fmt: skip
    assert ours <= chunked
    if input.dtype == torch.float32:
        assert ours < 4e-6 * TOKENS * CLASSES / 8
