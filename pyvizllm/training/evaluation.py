"""Evaluation: token-weighted sums over the whole evaluation data, read off the training thread."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pyvizllm.ops import CrossEntropyMetrics
from pyvizllm.telemetry import Publication
from pyvizllm.training.data import Source
from pyvizllm.training.objective import Objective, to_device
from pyvizllm.training.random_numbers import random_state, restore_random_state

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module,
    source: Source,
    objective: Objective,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    step: int,
) -> Callable[[], Publication]:
    """Run `model` over `source` without gradients, in eval mode.

    Returns the function that reads the sums and makes the publication of eval/*: it waits for the
    device, so it belongs on the publisher's thread. Modes and random numbers are afterwards as
    before, so that a training with evaluations takes the same steps as one without.
    """
    modes = {module: module.training for module in model.modules()}
    state = random_state()
    model.eval()
    try:
        with torch.no_grad():
            loss, count, metrics = _sums(model, source, objective, device, autocast)
    finally:
        for module, training in modes.items():
            module.training = training
        restore_random_state(state)
    wall_time = time.time()
    return lambda: Publication(step, wall_time, _scalars(loss, count, metrics))


def _sums(
    model: nn.Module,
    source: Source,
    objective: Objective,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, Tensor, CrossEntropyMetrics | None]:
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    count_sum = torch.zeros((), dtype=torch.int64)
    metrics_sum: CrossEntropyMetrics | None = None
    for batch in source.epoch(0, 0):
        count = objective.count(batch)
        with autocast():
            loss, metrics = objective(model, to_device(batch, device), count)
        # A batch without a counted target has no mean: 0 * NaN must not spoil the others.
        loss_sum += torch.where(count.to(device) > 0, loss.double(), 0.0)
        count_sum = count_sum + count
        if metrics is not None:
            metrics_sum = metrics if metrics_sum is None else metrics_sum + metrics
    return loss_sum, count_sum, metrics_sum


def _scalars(loss: Tensor, count: Tensor, metrics: CrossEntropyMetrics | None) -> dict[str, float]:
    if metrics is None:
        return {"eval/loss": float(loss / count)}  # sync point
    return {
        "eval/loss": float(metrics.loss),  # sync point
        "eval/accuracy": float(metrics.accuracy),  # sync point
        "eval/perplexity": float(metrics.perplexity),  # sync point
        "eval/entropy": float(metrics.entropy),  # sync point
    }
