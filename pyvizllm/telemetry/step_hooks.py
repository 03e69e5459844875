"""Hooks of every optimizer's step that can come and go while another thread steps.

torch iterates over its dictionaries of hooks during a step: to add or remove one meanwhile, in
another thread, raises in the middle of that step. So ours are registered once for the process, for
all optimizers, and stay; they look up who listens.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle


class StepListener(Protocol):
    """Is told of every step of every optimizer; what it raises, `step` raises."""

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """`optimizer` is about to step."""

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """`optimizer` has stepped."""


# Changed by one operation, and copied by one before it is iterated: a lock could be held by a
# thread at a fork, or by the code that a signal's handler interrupts.
_listeners: dict[StepListener, None] = {}
_registering = threading.Lock()
_registered: list[RemovableHandle] = []


def listen(listener: StepListener) -> None:
    """Tell `listener` of the steps from now on, after those that listen already."""
    with _registering:
        if not _registered:
            _registered.append(register_optimizer_step_pre_hook(_before))
            _registered.append(register_optimizer_step_post_hook(_after))
    _listeners[listener] = None


def forget(listener: StepListener) -> None:
    """Tell it no more."""
    _listeners.pop(listener, None)


@torch.compiler.disable  # a compiled step calls what is ours as it is: outside of its graph
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in tuple(_listeners):
        listener.before_step(optimizer, args, kwargs)


@torch.compiler.disable
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in tuple(_listeners):
        listener.after_step(optimizer, args, kwargs)
