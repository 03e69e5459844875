"""Norms and histograms of GPT-2's 148 gradients (124 M float32) against what people run today."""

from __future__ import annotations

import pytest
import torch
from tensorboardX import SummaryWriter
from torch import Tensor

from pyvizllm.models import GPT
from pyvizllm.ops import tensor_stats


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
        target={"torch._foreach_norm (norms only)": "at most 1.4x its time (0.71x)"},
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
