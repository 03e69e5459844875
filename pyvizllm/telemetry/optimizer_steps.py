"""What torch does not tell of an optimizer's step by its hooks."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.optim import Optimizer

# What torch puts around the `step` of every class of optimizers, and calls the hooks in.
_HOOKED_STEP = Optimizer.profile_hook_step(print).__code__


def steps_under_way() -> list[Optimizer]:
    """The optimizers in whose `step` this thread is, the innermost first.

    Hooks do not tell: none is called where a step raises. The stack does.
    """
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and "self" in (names := frame.f_locals):
            found.append(names["self"])
        frame = frame.f_back
    return found


def can_unscale(optimizer: Optimizer) -> bool:
    """Whether its gradients are not scaled, or would lose nothing if they were divided.

    Small values of float16 would be 0.
    """
    return getattr(optimizer, "grad_scale", None) is None or not any(
        gradient.dtype == torch.float16 or gradient.layout != torch.strided
        for gradient in _gradients(optimizer)
    )


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad for p in parameters if p.grad is not None]


def unscale(optimizer: Optimizer) -> bool:
    """Divide by a GradScaler's scale what it leaves to the optimizer; False where that cannot be.

    The optimizer is told that it is done, as GradScaler.unscale_ would have.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return True
    if not can_unscale(optimizer):
        return False
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in _gradients(optimizer):
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, gradients in by_device.items():
        torch._foreach_div_(gradients, scale.to(device, non_blocking=True))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    return True
