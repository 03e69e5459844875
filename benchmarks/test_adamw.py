"""Steps on GPT-2's 148 parameters (124 M float32) against torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from pyvizllm import AdamW
from pyvizllm.models import GPT

TORCH = "torch.optim.AdamW(fused=True)"


@pytest.fixture(scope="module")
def parameters() -> list[Parameter]:
    with torch.device("meta"):
        shapes = [p.shape for p in GPT.preset("gpt2").parameters()]
    generator = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-4
    return parameters


@pytest.fixture(scope="module")
def torchs(parameters) -> Callable[[], object]:
    copies = [Parameter(p.detach().clone()) for p in parameters]
    for copy, p in zip(copies, parameters, strict=True):
        copy.grad = p.grad  # neither of the two writes to gradients
    return torch.optim.AdamW(copies, lr=1e-5, fused=True).step


def test_without_collection(compare, parameters, torchs):
    compare(
        "one step of AdamW on GPT-2's parameters (124 M f32)",
        ("AdamW", AdamW(parameters, lr=1e-5).step),
        {TORCH: torchs},
        rounds=15,
        target={TORCH: "at most 1.0x its time (1.0x)"},
    )


def test_with_statistics(compare, parameters, torchs):
    optimizer = AdamW(parameters, lr=1e-5)
    optimizer.collect(histograms=False)
    compare(
        "the same, with statistics of updates and parameters",
        ("AdamW with statistics", optimizer.step),
        {TORCH: torchs},
        rounds=15,
        target={TORCH: "at most 1.05x its time (0.95x)"},
    )


def test_with_histograms(compare, parameters, torchs):
    optimizer = AdamW(parameters, lr=1e-5)
    optimizer.collect()
    compare(
        "the same, with both histograms too",
        ("AdamW with histograms", optimizer.step),
        {TORCH: torchs},
        rounds=15,
        target={TORCH: "at most 1.7x its time (0.59x)"},
    )


def test_a_thousand_small_parameters(compare):
    """The cost of a call, per parameter: 1000 tensors of 10 elements."""
    ours, theirs = ([Parameter(torch.ones(10)) for _ in range(1000)] for _ in range(2))
    for p in (*ours, *theirs):
        p.grad = torch.ones(10)
    optimizer, fused = AdamW(ours), torch.optim.AdamW(theirs, fused=True)
    compare(
        "one step of AdamW on 1000 parameters of 10 elements",
        ("AdamW", optimizer.step),
        {TORCH: fused.step},
        rounds=31,
    )
