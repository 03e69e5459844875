"""Learning-rate schedules as pure functions of the step, and the optimizers made by name."""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pyvizllm.optim import AdamW
from pyvizllm.training.config import TrainConfig

__all__ = ["constant", "cosine", "follow_schedule", "linear", "make_optimizer", "make_schedule"]


def constant(step: int, *, warmup_steps: int = 0, total_steps: int | None = None) -> float:
    """Factor of the learning rate at `step` (0-based): a linear rise, then 1."""
    return _warmup(step, warmup_steps)


def linear(step: int, *, warmup_steps: int = 0, total_steps: int) -> float:
    """Factor of the learning rate at `step` (0-based): a linear rise, then a line down to 0."""
    return _warmup(step, warmup_steps) * (1.0 - _progress(step, warmup_steps, total_steps))


def cosine(step: int, *, warmup_steps: int = 0, total_steps: int) -> float:
    """Factor of the learning rate at `step` (0-based): a linear rise, then half a cosine to 0."""
    progress = _progress(step, warmup_steps, total_steps)
    return _warmup(step, warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _warmup(step: int, warmup_steps: int) -> float:
    # The +1 on both sides: no step is wasted at a rate of 0, and the peak is reached exactly once.
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    return min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))


def make_schedule(config: TrainConfig, optimizer: Optimizer, total_steps: int | None) -> LambdaLR:
    """The schedule that `config.lr_scheduler_type` names, over the optimizer's own learning rates.

    Raises:
        ValueError: linear or cosine where the number of steps is not known.
    """
    factor: Callable[..., float]
    if config.lr_scheduler_type == "constant":
        factor = functools.partial(constant, warmup_steps=config.warmup_steps)
    elif total_steps is None:
        raise ValueError(
            "train: expected max_steps (or lr_scheduler_type='constant') for data without a "
            f"length, got lr_scheduler_type={config.lr_scheduler_type!r}"
        )
    else:
        shape = {"linear": linear, "cosine": cosine}[config.lr_scheduler_type]
        factor = functools.partial(shape, warmup_steps=config.warmup_steps, total_steps=total_steps)
    # A lambda and not the partial itself: LambdaLR puts the state of callable objects into
    # checkpoints, and would bring back the old total_steps when a run is resumed to go further.
    return LambdaLR(optimizer, lambda step: factor(step))


def follow_schedule(scheduler: LRScheduler) -> None:
    """Give a resumed optimizer the learning rates of its schedule at the step where that stands.

    The checkpoint holds those of the schedule that it was saved under: where a run is resumed to go
    further, its first step would be one at the old schedule's end, at a learning rate of 0.
    """
    if isinstance(scheduler, LambdaLR):  # as LambdaLR works them out, to the bit
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        groups = scheduler.optimizer.param_groups
        for group, base, factor in zip(groups, scheduler.base_lrs, factors, strict=True):
            group["lr"] = base * factor


def make_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """AdamW or SGD over the trainable parameters; only those of two or more dimensions decay.

    The fused implementations are used: one pass over the memory, and no host read of the step
    counter on any device.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = _all_fusible(trainable)
    if config.optim == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, fused=fused
        )
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(float(config.adam_beta1), float(config.adam_beta2)),
        eps=config.adam_epsilon,
        fused=fused,
    )


def _all_fusible(parameters: Iterable[torch.Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
