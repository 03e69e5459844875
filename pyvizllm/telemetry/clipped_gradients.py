"""The gradients that `pyvizllm.clip_grad_norm_` has clipped in the step under way."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class ClippedGradients:
    """Knows clipped gradients again when their parameters are clipped once more.

    A backward adds to a gradient in place, and zero_grad leaves none (unless set_to_none is
    False, which cannot be told from accumulating): another tensor is another step's gradient.
    """

    def __init__(self) -> None:
        # Weakly: they must not outlive a zero_grad.
        self._seen: dict[Tensor, tuple[weakref.ref[Tensor], int]] = {}

    def __bool__(self) -> bool:
        return bool(self._seen)

    def add(self, gradients: dict[Tensor, Tensor]) -> None:
        """Take note of gradients, by their parameters, that are about to be clipped."""
        for parameter, gradient in gradients.items():
            self._seen[parameter] = weakref.ref(gradient), gradient._version

    def clear(self) -> None:
        """The step is over."""
        self._seen.clear()

    def replaced(self, gradients: dict[Tensor, Tensor]) -> bool:
        """Whether a parameter has another gradient than the one that was clipped."""
        return any(gradient is not before() for gradient, before, _ in self._again(gradients))

    def accumulated(self, gradients: dict[Tensor, Tensor]) -> bool:
        """Whether something was added to a gradient after it was clipped."""
        # Our own clipping has added 1 to the version.
        return any(g is ref() and g._version > v + 1 for g, ref, v in self._again(gradients))

    def _again(
        self, gradients: dict[Tensor, Tensor]
    ) -> Iterable[tuple[Tensor, weakref.ref[Tensor], int]]:
        return ((g, *self._seen[p]) for p, g in gradients.items() if p in self._seen)
