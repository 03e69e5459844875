"""Norms and histograms of GPT-2's 148 gradients (124 M float32) against what people run today."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
from tensorboardX import SummaryWriter
from torch import Tensor

from pyvizllm.models import GPT
from pyvizllm.ops import BINS, clip_grad_norm_, tensor_stats


@pytest.fixture(scope="module")
def gradients() -> list[Tensor]:
    with torch.device("meta"):
        shapes = [p.shape for p in GPT.preset("gpt2").parameters()]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 1e-4 for shape in shapes]


def test_against_one_norm_each(compare, gradients):
    compare(
        "statistics and histograms of GPT-2's gradients (124 M f32)",
        ("tensor_stats", lambda: tensor_stats(gradients)),
        {"torch._foreach_norm (norms only)": lambda: torch._foreach_norm(gradients)},
        rounds=15,
        target={"torch._foreach_norm (norms only)": "at most 1.1x its time (0.91x)"},
    )


def test_into_the_histograms_of_earlier_steps(compare, gradients):
    """As a training does: no new memory for 148 histograms at each step."""
    counts = torch.zeros(len(gradients), BINS, dtype=torch.int64)
    compare(
        "the same, added to the histograms of earlier steps",
        ("tensor_stats", lambda: tensor_stats(gradients, histogram=counts)),
        {"torch._foreach_norm (norms only)": lambda: torch._foreach_norm(gradients)},
        rounds=15,
    )


def test_without_histograms(compare, gradients):
    compare(
        "statistics of GPT-2's gradients, no histograms",
        ("tensor_stats", lambda: tensor_stats(gradients, histogram=False)),
        {"torch._foreach_norm (norms only)": lambda: torch._foreach_norm(gradients)},
        rounds=15,
    )


def test_against_histograms(compare, gradients, tmp_path):
    writer = SummaryWriter(str(tmp_path))

    def add_histograms() -> None:
        for index, gradient in enumerate(gradients):
            writer.add_histogram(f"grad/{index}", gradient, 0)

    def histc() -> None:
        for gradient in gradients:
            gradient.norm()
            torch.histc(gradient, bins=64)

    compare(
        "statistics and histograms of GPT-2's gradients (124 M f32)",
        ("tensor_stats", lambda: tensor_stats(gradients)),
        {"tensorboardX add_histogram": add_histograms, "torch.histc and norm": histc},
        rounds=3,
        target={"tensorboardX add_histogram": "60x"},
    )
    writer.close()


def test_clipping(compare, gradients):
    """Norms below max_norm, as in most steps: torch multiplies by 1, ours leaves them alone."""
    parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    theirs = "torch.nn.utils.clip_grad_norm_ (no statistics)"
    compare(
        "clipping, statistics and histograms of GPT-2's gradients",
        ("clip_grad_norm_", lambda: clip_grad_norm_(parameters, 1e6, return_statistics=True)),
        {theirs: lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e6)},
        rounds=15,
        target={theirs: "at most 1.2x its time (0.83x)"},
    )


def test_clipping_by_a_factor(compare, gradients):
    """Norms above max_norm in every round: each call allows one per cent less."""
    parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norms = itertools.accumulate(
        itertools.repeat(0.99),
        initial=float(torch.nn.utils.get_total_norm(gradients)),
        func=operator.mul,
    )
    theirs = "torch.nn.utils.clip_grad_norm_ (no statistics)"
    compare(
        "the same where the norm is too large",
        (
            "clip_grad_norm_",
            lambda: clip_grad_norm_(parameters, next(norms), return_statistics=True),
        ),
        {theirs: lambda: torch.nn.utils.clip_grad_norm_(parameters, next(norms))},
        rounds=15,
        target={theirs: "at most 1.2x its time (0.83x)"},
    )
