"""Evaluation: token-weighted sums over the whole evaluation data, read off the training thread."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics
from pyvizllm.telemetry import Publication
from pyvizllm.training.data import ELSEWHERE, Source, begin_alike
from pyvizllm.training.objective import to_device
from pyvizllm.training.preparation import Run
from pyvizllm.training.random_numbers import random_state, restore_random_state

__all__ = ["evaluate"]


def evaluate(run: Run, source: Source, step: int) -> Callable[[], Publication]:
    """Run the model over `source` without gradients, in eval mode; each process over its share.

    Returns the function that reads the sums and makes the publication of eval/*: it waits for the
    device, so it belongs on the publisher's thread. Modes and random numbers are afterwards as
    before, so that a training with evaluations takes the same steps as one without.
    """
    modes = {module: module.training for module in run.model.modules()}
    state = random_state()
    begin_alike(source, run.processes)
    run.processes.share_buffers(run.model)
    run.model.eval()
    try:
        with torch.no_grad():
            sums = run.processes.sum_of(_sums(run, source))
    finally:
        for module, training in modes.items():
            module.training = training
        restore_random_state(state)
    wall_time = time.time()
    return lambda: Publication(step, wall_time, _scalars(sums))


def _sums(run: Run, source: Source) -> Tensor:
    """[3 + 53] float64: the loss, its targets, the batches with metrics; those metrics."""
    sums = torch.zeros(3 + CrossEntropyMetrics.SIZE, dtype=torch.float64, device=run.device)
    for batch in source.epoch(0, 0):
        if batch is ELSEWHERE:
            continue
        count = run.objective.count(batch)
        with run.autocast():
            loss, metrics = run.objective(run.model, to_device(batch, run.device), count)
        count = count.to(run.device)
        # A batch without a counted target has no mean: 0 * NaN must not spoil the others.
        sums[0] += torch.where(count > 0, loss.double(), 0.0)
        sums[1] += count
        if metrics is not None:
            sums[2] += 1
            sums[3:] += metrics.sums
    return sums


def _scalars(sums: Tensor) -> dict[str, float]:
    loss, count, with_metrics, *_ = sums.tolist()  # sync point
    if with_metrics == 0:
        return {"eval/loss": loss / count if count else math.nan}
    metrics = CrossEntropyMetrics(sums[3:])
    return {
        "eval/loss": float(metrics.loss),  # sync point
        "eval/accuracy": float(metrics.accuracy),  # sync point
        "eval/perplexity": float(metrics.perplexity),  # sync point
        "eval/entropy": float(metrics.entropy),  # sync point
    }
