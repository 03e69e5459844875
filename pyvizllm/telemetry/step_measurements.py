"""What is measured of the step under way, and by whom."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.ops import TensorStats
from pyvizllm.optim import AdamW
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.optimizer_steps import can_unscale, unscale
from pyvizllm.telemetry.recorder import AS_GIVEN, STILL_SCALED, Recorder
from pyvizllm.telemetry.records import KINDS, Kind

_logger = logging.getLogger("pyvizllm")


class StepMeasurements:
    """Measures each block's gradients once in a step, and updates where the step is published.

    Our AdamW measures what it does in its own pass over the parameters; what others do is measured
    around their step.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._measured: set[Block] = set()  # whose gradients have been, in this step
        self._remembered: set[Block] = set()  # whose parameters are kept as they were
        self._attempted: set[Block] | None = None  # measured by an optimizer's step under way
        self._collecting: set[Optimizer] = set()
        self._warned = False

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        """Those whose gradients have not been measured in this step."""
        return [block for block in blocks if block not in self._measured]

    def gradients(self) -> dict[Tensor, Tensor]:
        """The gradients that have been measured, by their parameters, as they are now."""
        return {p: p.grad for b in self._measured for p in b.parameters if p.grad is not None}

    def measure(self, block: Block, stage: str) -> Tensor:
        """Measure a block's gradients, and return their norm."""
        block.find_unfrozen()
        stats = block.measure_gradients(count=True)
        self._store_gradients(block, stats, stage)
        return stats.total_norm

    # -- An optimizer's step ----------------------------------------------------------------------

    def begin(self, optimizer: Optimizer, blocks: Sequence[Block]) -> None:
        """A step of an optimizer begins, which may raise and be tried again."""
        self._attempted = set()
        for block in self.missing(blocks):
            # Of an optimizer that is new: clipping has measured its gradients as another's.
            if any(map(block.shares_with, self._measured)):
                self._measured.add(block)
        self._tell_of_scale(optimizer, blocks)

    def before_step(
        self, optimizer: Optimizer, blocks: Sequence[Block], *, closure: bool, stage: str
    ) -> None:
        """Measure what a step is given, and see to it that what it does is measured.

        Arguments:
            blocks: the optimizer's.
            closure: the optimizer computes the gradients itself, so they are not there yet.
            stage: of the gradients that are there.
        """
        if isinstance(optimizer, AdamW) and self._collect(optimizer, blocks, closure, stage):
            return
        if not closure:
            self._measure_gradients(optimizer, blocks, stage)
        if self._recorder.next_is_published:
            for block in blocks:
                block.remember_parameters()
                self._remembered.add(block)

    def after_step(self, optimizer: Optimizer, blocks: Sequence[Block], *, closure: bool) -> None:
        """Measure what a step has done; `closure`: and the gradients, which it has computed."""
        self._attempted = None
        if isinstance(optimizer, AdamW) and optimizer in self._collecting:
            self._store_collected(optimizer, blocks)
        if closure:
            self._measure_gradients(optimizer, blocks, AS_GIVEN)
        for block in blocks:
            if block in self._remembered:
                self._recorder.store(block, "update", block.measure_updates())
                self._recorder.store(block, "param", block.measure_parameters())

    # -- What is not to count ---------------------------------------------------------------------

    @property
    def attempting(self) -> bool:
        """Whether an optimizer's step has begun that is not over."""
        return self._attempted is not None

    def give_up_attempt(self) -> None:
        """Forget what an optimizer's step has measured that has raised."""
        counted = bool(self._attempted or self._collecting)
        self._measured -= self._attempted or set()
        self._attempted = None
        self._remembered.clear()
        if counted:
            self._recorder.restart(KINDS)

    def forget(self, blocks: Sequence[Block]) -> None:
        """Forget what was measured of the gradients of `blocks`, which were not complete."""
        if not self._measured.isdisjoint(blocks):
            self._discard(self._measured.intersection(blocks))
            self._recorder.restart(("grad",))
            self._recorder.clipped_to(math.nan)

    def forget_all(self) -> None:
        """Forget everything that was measured in this step."""
        self._discard(self._measured)
        self._recorder.restart(KINDS)

    def _discard(self, blocks: Collection[Block]) -> None:
        for block in blocks:
            self._recorder.discard(block, "grad")
        self._measured = self._measured.difference(blocks)

    def end(self) -> None:
        """The step is over."""
        self._measured.clear()
        self._remembered.clear()
        self._attempted = None

    # -- Measuring --------------------------------------------------------------------------------

    def _measure_gradients(self, optimizer: Optimizer, blocks: Sequence[Block], stage: str) -> None:
        missing = self.missing(blocks)
        if missing and unscale(optimizer):
            for block in missing:
                self.measure(block, stage)
            self._attempt(missing)

    def _attempt(self, blocks: Sequence[Block]) -> None:
        """Take note of what the step under way has measured."""
        if self._attempted is not None:
            self._attempted.update(blocks)

    def _collect(
        self, optimizer: AdamW, blocks: Sequence[Block], closure: bool, stage: str
    ) -> bool:
        """Let the step itself measure what it does, where it can."""
        claimed = optimizer.collecting and optimizer not in self._collecting  # by somebody else
        if claimed or not optimizer.can_collect() or not blocks:
            return False
        (block,) = blocks
        block.find_unfrozen()
        # It reads the gradients itself for these, and measures them with the same read.
        reads = closure or optimizer.max_grad_norm is not None or optimizer.skip_nonfinite
        grad = reads and block not in self._measured and can_unscale(optimizer)
        if grad:  # and not by a closure that clips, too
            self._measured.add(block)
            self._attempt(blocks)
        else:
            self._measure_gradients(optimizer, blocks, stage)
        kinds: list[Kind] = ["grad"] if grad else []
        if self._recorder.next_is_published:
            # Statistics hide behind the step's memory traffic, counting does not: it is for the
            # steps that are published, as with other optimizers.
            kinds += ["update", "param"]
        counts: dict[str, Tensor] = {
            kind: c for kind in kinds if (c := block.accumulator(kind)) is not None
        }
        optimizer.collect_next(grad=grad, histograms=counts)
        self._collecting.add(optimizer)
        return True

    def _store_collected(self, optimizer: AdamW, blocks: Sequence[Block]) -> None:
        self._collecting.discard(optimizer)
        collected, optimizer.collected = optimizer.collected, None
        if collected is None:
            return
        (block,) = blocks
        if collected.grad is not None:
            self._store_gradients(block, collected.grad, AS_GIVEN)
        counted = self._recorder.next_is_published
        if collected.update is not None and collected.param is not None:
            self._recorder.store(block, "update", collected.update, counted=counted)
            self._recorder.store(block, "param", collected.param, counted=counted)

    def _store_gradients(self, block: Block, stats: TensorStats, stage: str) -> None:
        self._recorder.store(block, "grad", stats)
        self._recorder.find_nonfinite(block, stats)
        self._recorder.measured_at(stage)
        self._measured.add(block)

    def _tell_of_scale(self, optimizer: Optimizer, blocks: Sequence[Block]) -> None:
        """Say so where clipping has measured gradients that a GradScaler still scales."""
        scaled = getattr(optimizer, "grad_scale", None) is not None
        if scaled and not self._measured.isdisjoint(blocks):
            self._recorder.measured_at(STILL_SCALED)
            if not self._warned:
                self._warned = True
                _logger.warning(
                    "watch: gradients were clipped, and measured, while they were still scaled; "
                    "call scaler.unscale_(optimizer) before clipping"
                )
