"""Steps that change nothing although the optimizer is called: gradients were not finite."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.optim import AdamW
from pyvizllm.telemetry.recorder import Recorder
from pyvizllm.telemetry.step_buffer import SKIPPED


class SkippedSteps:
    """Notes them as what the device knows: nothing is read."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._before: Tensor | None = None  # those that skip_nonfinite has counted

    def before_step(self, optimizer: Optimizer) -> None:
        """Note what a GradScaler has told an optimizer that takes the scale itself."""
        self._before = None
        if isinstance(optimizer, AdamW) and optimizer.skip_nonfinite:
            self._before = optimizer.skipped_steps.clone()
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._recorder.note(SKIPPED, found_inf)

    def after_step(self, optimizer: Optimizer) -> None:
        """Note what skip_nonfinite has counted."""
        if self._before is None or not isinstance(optimizer, AdamW):
            return
        now = optimizer.skipped_steps
        # The first count is a 0 of the CPU: to bring that to a GPU waits for nothing.
        self._recorder.note(SKIPPED, now - self._before.to(now.device, non_blocking=True))
        self._before = None
