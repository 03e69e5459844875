"""The sketch of GPT-2's 148 parameters (124 M float32), as taken once a publication."""

from __future__ import annotations

import torch

from pyvizllm.models import GPT
from pyvizllm.ops import sketch


def test_sketch_against_one_norm_each(compare):
    with torch.device("meta"):
        shapes = [p.shape for p in GPT.preset("gpt2").parameters()]
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in shapes]
    compare(
        "sketch of GPT-2's parameters (124 M f32)",
        ("sketch", lambda: sketch(parameters)),
        {"torch._foreach_norm": lambda: torch._foreach_norm(parameters)},
        rounds=15,
    )
