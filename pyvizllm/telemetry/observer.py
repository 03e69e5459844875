"""Takes statistics at the optimizer's own step hooks, and before our clipping."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, MutableSet, Sequence
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.optim import AdamW
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.clipped_gradients import ClippedGradients
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.optimizer_blocks import OptimizerBlocks
from pyvizllm.telemetry.optimizer_steps import steps_under_way
from pyvizllm.telemetry.recorder import (
    AS_GIVEN,
    BEFORE_CLIPPING,
    BEFORE_HOOKS,
    Recorder,
)
from pyvizllm.telemetry.records import Kind
from pyvizllm.telemetry.skipped_steps import SkippedSteps
from pyvizllm.telemetry.step_buffer import GROUP_RATE, RATE
from pyvizllm.telemetry.step_measurements import StepMeasurements

Rate = float | Tensor | None


class StepObserver:
    """Finds out when a step begins and ends, and measures what it does.

    A step is over when all optimizers that step have stepped: those that were given, or, where
    none was, those that stepped in the step before. One that steps again begins a new step, and
    so does one that has the parameters of another.

    Arguments:
        recorder: keeps what is measured, and says in which steps to measure.
        names: the watched parameters and their names.
        optimizers: those to watch; None for all that step the watched parameters.
        histograms: the kinds that are counted.
        statistics: whether anything is measured.
    """

    def __init__(
        self,
        recorder: Recorder,
        names: WatchedNames,
        optimizers: Sequence[Optimizer] | None,
        histograms: Sequence[Kind],
        statistics: bool = True,
    ) -> None:
        self._recorder, self._statistics = recorder, statistics
        self._measured = StepMeasurements(recorder)
        self._blocks = OptimizerBlocks(recorder, names, histograms)
        self._learns = optimizers is None  # who steps is seen in the steps
        self._expected = None if optimizers is None else set(optimizers)
        self._stepped: dict[Optimizer, list[Rate]] = {}  # with the rates of its groups
        self._started: MutableSet[Block] = WeakSet()  # those that have stepped before
        self._skipped = SkippedSteps(recorder)
        self._clipped = ClippedGradients()
        self._clips_parts = False  # whether each micro-batch was clipped in the last step
        self._in_parts = False  # and in this one
        for optimizer in optimizers or ():
            if self._blocks.update(optimizer):
                for block in self._blocks[optimizer]:
                    recorder.activate(block)

    @property
    def stepped(self) -> bool:
        """Whether the step under way has changed parameters."""
        return bool(self._stepped)

    @property
    def partly(self) -> bool:
        """Whether some optimizers have stepped, and others are known to be still to come."""
        return bool(self._stepped) and self._expected is not None

    @property
    def measures(self) -> bool:
        """Whether this step is one of those that are measured."""
        return self._statistics and self._recorder.next_is_measured

    def finish(self) -> None:
        """End the step under way, if it has changed parameters."""
        if self._stepped:
            rates = [self._stepped[o] for o in self._blocks if o in self._stepped]
            for tag, rate in by_tag(itertools.chain(*rates)).items():
                self._recorder.note_setting(tag, rate)
            if self._learns:
                self._expected = set(self._stepped)
            if self._statistics and self._recorder.next_is_published:
                for block in self._recorder.blocks:
                    self._recorder.sketch(block)
            self._end()

    def break_off(self) -> None:
        """End the step under way, though it has changed nothing: what it logged is shown."""
        if self._recorder.under_way:
            self._end()

    # -- The optimizer's hooks --------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *, closure: bool, last: bool = True) -> None:
        """Called before a step, or a step that is part of it.

        Arguments:
            optimizer: whose step it is.
            closure: the optimizer computes the gradients itself, so they are not there yet.
            last: no other hook comes after this one.
        """
        watched = self._learns or optimizer in (self._expected or ())
        if not watched or not self._blocks.update(optimizer) or self._is_part():
            return
        self._give_up_attempt()
        blocks = self._blocks[optimizer]
        if optimizer in self._stepped or self._recorder.displaces(blocks):
            self.finish()
        self._recorder.begin()
        for block in blocks:
            self._recorder.activate(block)
        if self._statistics:
            for block in blocks:
                if block not in self._started:
                    self._started.add(block)
                    block.find_unfrozen()
                    self._recorder.sketch_start(block)
        self._skipped.before_step(optimizer)
        self._measured.begin(optimizer, blocks)
        if self.measures:
            stage = AS_GIVEN if last else BEFORE_HOOKS
            self._measured.before_step(optimizer, blocks, closure=closure, stage=stage)

    def after_step(self, optimizer: Optimizer, *, closure: bool) -> None:
        if optimizer not in self._blocks or self._is_part():
            return
        blocks = self._blocks[optimizer]
        self._skipped.after_step(optimizer)
        limit = optimizer.max_grad_norm if isinstance(optimizer, AdamW) else None
        if limit is not None and not self._clipped:
            self._note_limit(limit, blocks)
        self._measured.after_step(optimizer, blocks, closure=closure and self.measures)
        # Now: where the step is not over yet, a scheduler may come before its end.
        self._stepped[optimizer] = learning_rates(optimizer)
        if self._expected is not None and self._expected <= self._stepped.keys():
            self.finish()

    # -- Clipping ---------------------------------------------------------------------------------

    def before_clipping(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor | None:
        """Measure the gradients that are about to be scaled; their norm, if they are all of ours.

        Gradients that are new, though the last ones were clipped and never stepped with, are those
        of another step: a GradScaler has skipped the one between, if they were not finite. Where
        each micro-batch is clipped, the whole step's gradients are those that the optimizer gets.
        """
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        if self._learns and self._statistics and not self._recorder.blocks:
            self._blocks.lay_out_model()
        blocks = [b for b in self._recorder.blocks if not gradients.keys().isdisjoint(b.parameters)]
        if not blocks:
            return None
        if not self._steps_now():  # or it is a closure that clips
            self._give_up_attempt()
            if any(block in self._blocks[o] for o in self._stepped for block in blocks):
                self.finish()  # what has stepped has new gradients
            elif self._clipped.replaced(gradients):
                self._recorder.note_given_up()
                self.finish() if self._stepped else self._end()
            elif self._clipped.accumulated(gradients):
                self._in_parts = True
                self._measured.forget(blocks)
        self._recorder.begin()
        first = not self._clipped
        self._clipped.add(gradients)
        measures = self.measures and not (self._clips_parts or self._in_parts)
        new = self._measured.missing(blocks) if measures else []
        if not new:
            return None
        ours = {p for b in blocks for p in b.parameters if p.grad is not None}
        others = gradients.keys() != ours  # than those of these blocks
        if first and not others:
            self._note_limit(max_norm, blocks)
        norms = [self._measured.measure(block, BEFORE_CLIPPING) for block in new]
        if others or len(norms) < len(blocks) or any(b.incomplete for b in blocks):
            return None
        return norms[0] if len(norms) == 1 else _joint_norm(norms)

    def _note_limit(self, max_norm: float, blocks: Sequence[Block]) -> None:
        """Note the limit of the norm of `blocks`, if that is the norm that is shown."""
        if len(blocks) == len(self._recorder.blocks) and all(b.shows_all for b in blocks):
            self._recorder.clipped_to(float(max_norm))

    # -- Steps and blocks -------------------------------------------------------------------------

    def _is_part(self) -> bool:
        """Whether the step that calls is part of another: of a subclass's, of a wrapper's."""
        return any(outer in self._blocks for outer in steps_under_way()[1:])

    def _steps_now(self) -> bool:
        """Whether one of the watched optimizers is in the middle of its step."""
        return any(optimizer in self._blocks for optimizer in steps_under_way())

    def _give_up_attempt(self) -> None:
        """Forget what was measured of an optimizer's step that has raised: it is tried again."""
        if not self._measured.attempting:
            return
        self._measured.give_up_attempt()
        if self._clipped.replaced(self._measured.gradients()):
            self._measured.forget_all()  # not even its gradients are those that were clipped
            self._clipped.clear()

    def _end(self) -> None:
        self._recorder.end()
        self._measured.end()
        self._stepped.clear()
        self._clipped.clear()
        self._clips_parts, self._in_parts = self._in_parts, False


def learning_rates(optimizer: Optimizer) -> list[Rate]:
    """Of each group as it is now; no tensor is read."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]


def by_tag(rates: Iterable[Rate]) -> dict[str, float | Tensor]:
    """The first group's, and all others by their number."""
    tags = ((GROUP_RATE.format(number) if number else RATE, r) for number, r in enumerate(rates))
    return {tag: rate for tag, rate in tags if rate is not None}


def _joint_norm(norms: Sequence[Tensor]) -> Tensor:
    # On a GPU if one is there: to bring a norm from it to the CPU would be to wait for it.
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), norms[0].device)
    return torch.stack([norm.to(device, non_blocking=True) for norm in norms]).norm()
