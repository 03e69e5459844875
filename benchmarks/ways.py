"""Ways to do what pyvizllm does, ours and others', on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvizllm.ops import cross_entropy


class Model(torch.autograd.Function):
    """Hands out the logits without a copy and drops their gradient."""

    @staticmethod
    def forward(ctx, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


@functools.cache
def compiled_cross_entropy(backend: str = "inductor", function=F.cross_entropy):
    return torch.compile(function, dynamic=False, backend=backend)


def loss_of(function, logits: Tensor, target: Tensor, **options) -> Callable[[], Tensor]:
    """The forward of a training step: the logits are no leaf."""
    parameter = torch.zeros((), requires_grad=True, device=logits.device)
    return lambda: function(Model.apply(parameter, logits), target, **options)


def step(function, logits: Tensor, target: Tensor, **options) -> Callable[[], None]:
    """From the logits to their gradient."""
    forward = loss_of(function, logits, target, **options)
    return lambda: forward().backward()


def backward_of(function, logits: Tensor, target: Tensor, **options) -> Callable[[], None]:
    """From the loss to the gradient of the logits, again and again."""
    loss = loss_of(function, logits, target, **options)()
    return lambda: loss.backward(retain_graph=True)


def loss_only(logits: Tensor, target: Tensor, **options) -> Tensor:
    loss, _ = cross_entropy(logits, target, return_metrics=True, **options)
    return loss


def watch_as_wandb_does(tensors: list[Tensor], bins: int = 64) -> list[tuple[list, list]]:
    """What wandb.watch does to each gradient it logs, but for sending the result.

    After TorchHistory.log_tensor_stats in wandb/integration/torch/wandb_torch.py: a copy, a
    conversion to float32, a search for NaN and Inf, the minimum and the maximum read by the host, a
    histogram read by the host.
    """
    histograms = []
    for tensor in tensors:
        flat = tensor.detach().clone().reshape(-1).float()
        if (~torch.isfinite(flat)).all().item():
            continue
        if not torch.isfinite(flat).all():
            flat = flat[torch.isfinite(flat)]
        low, high = flat.min().item(), flat.max().item()
        if low == high:
            counts, edges = torch.tensor([flat.numel()]), torch.tensor([low, high])
        else:
            counts = flat.histc(bins=bins, min=low, max=high).cpu()
            edges = torch.linspace(low, high, steps=bins + 1)
        histograms.append((counts.tolist(), edges.tolist()))
    return histograms


class Unmoved(torch.optim.Optimizer):
    """Takes steps that change nothing: what is timed is telemetry alone."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure=None) -> None:
        return None


def times(count: int, step: Callable[[], None]) -> Callable[[], None]:
    """One function that takes `count` steps."""

    def run() -> None:
        for _ in range(count):
            step()

    return run
