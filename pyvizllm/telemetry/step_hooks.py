"""Hooks of optimizers' steps that can come and go while another thread steps.

torch iterates over its dictionaries of hooks during a step: to add or remove one meanwhile, in
another thread, raises in the middle of that step. So ours are registered once, when an optimizer is
watched for the first time, and stay; they look up who listens. There is no lock, which a fork could
copy locked: two threads that watch an optimizer first at once register two, of which one is idle.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

_Register = Callable[[Callable[[Optimizer, Any, Any], None]], RemovableHandle]


class StepListener(Protocol):
    """Is told of steps; what it raises, `step` raises."""

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """`optimizer` is about to step."""

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """`optimizer` has stepped."""


class StepHooks:
    """Ours of one optimizer, or of all, and who listens to them: `listeners[listener] = None`."""

    def __init__(self, register_pre: _Register, register_post: _Register) -> None:
        # Changed by one operation, and copied by one before it is iterated: a lock could be held
        # by a thread at a fork, or by the code that a signal's handler interrupts.
        self.listeners: dict[StepListener, None] = {}
        # A compiled step calls what is ours as it is: outside of its graph.
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        _ids.add(register_pre(before).id)
        register_post(after)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for listener in tuple(self.listeners):
            listener.before_step(optimizer, args, kwargs)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for listener in tuple(self.listeners):
            listener.after_step(optimizer, args, kwargs)


_ids: set[int] = set()  # of our hooks before a step
_of_one: MutableMapping[Optimizer, StepHooks] = WeakKeyDictionary()
_of_all: list[StepHooks] = []


def hooks_follow(optimizer: Optimizer) -> bool:
    """Whether a hook of other code is called before the step, and after all of ours."""
    called = [*_global_optimizer_pre_hooks, *optimizer._optimizer_step_pre_hooks]
    return bool(called) and called[-1] not in _ids


def hooks_of(optimizers: Sequence[Optimizer] | None) -> list[StepHooks]:
    """Ours of each of these optimizers; None: those of all that there are and will be."""
    if optimizers is None:
        if not _of_all:
            pre, post = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
            _of_all.append(StepHooks(pre, post))
        return _of_all[:1]
    for each in optimizers:
        if each not in _of_one:
            pre, post = each.register_step_pre_hook, each.register_step_post_hook
            _of_one.setdefault(each, StepHooks(pre, post))
    return [_of_one[each] for each in optimizers]
