"""Flags that are only known at run time: mypy checks these calls too (pyproject.toml)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pyvizllm.ops import (
    CrossEntropyMetrics,
    TensorStats,
    clip_grad_norm_,
    cross_entropy,
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

Flag = bool | Literal["per_token"]
FLAGS: tuple[Flag, ...] = (False, True, "per_token")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meet: Path = tmp_path_factory.mktemp("ranks") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_uniform(result: Tensor | tuple[Tensor, CrossEntropyMetrics], flag: Flag) -> None:
    """The loss of four equal logits, and the metrics that were asked for."""
    assert isinstance(result, tuple) == bool(flag)
    loss = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(loss, torch.tensor(4.0).log())
    if isinstance(result, tuple):
        assert result[1].tokens == 3
        assert (result[1].per_token is not None) == (flag == "per_token")


@pytest.mark.parametrize("flag", FLAGS)
def test_losses(flag: Flag, one_rank: None) -> None:
    logits, target = torch.zeros(3, 4), torch.tensor([0, 3, 1])
    hidden, weight = torch.ones(3, 2), torch.zeros(4, 2)
    assert_uniform(cross_entropy(logits, target, return_metrics=flag), flag)
    assert_uniform(linear_cross_entropy(hidden, weight, target, return_metrics=flag), flag)
    assert_uniform(vocab_parallel_cross_entropy(logits, target, return_metrics=flag), flag)
    assert_uniform(
        vocab_parallel_linear_cross_entropy(hidden, weight, target, return_metrics=flag), flag
    )


@pytest.mark.parametrize("flag", [False, True])
def test_clip_grad_norm(flag: bool) -> None:
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, 4.0])
    result: Tensor | tuple[Tensor, TensorStats]
    result = clip_grad_norm_([parameter], 1.0, return_statistics=flag)
    assert isinstance(result, tuple) == flag
    norm = result[0] if isinstance(result, tuple) else result
    assert norm == 5
    if isinstance(result, tuple):
        assert result[1].abs_max == 4
