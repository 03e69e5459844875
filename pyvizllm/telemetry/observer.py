"""Takes statistics at the optimizer's own step hooks, and before our clipping."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterable, MutableMapping, MutableSet, Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.optim import AdamW
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.clipped_gradients import ClippedGradients
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.optimizer_steps import steps_under_way, unscale
from pyvizllm.telemetry.recorder import (
    AS_GIVEN,
    BEFORE_CLIPPING,
    BEFORE_HOOKS,
    STILL_SCALED,
    Recorder,
)
from pyvizllm.telemetry.records import KINDS, Kind
from pyvizllm.telemetry.skipped_steps import SkippedSteps
from pyvizllm.telemetry.step_buffer import GROUP_RATE, RATE

_WITHOUT_VALUES = torch.device("meta")
_logger = logging.getLogger("pyvizllm")


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
        self._recorder = recorder
        self._names, self._histograms, self._statistics = names, histograms, statistics
        self._learns = optimizers is None  # who steps is seen in the steps
        self._expected = None if optimizers is None else set(optimizers)
        # Optimizers that nobody uses any more are not kept alive.
        self._parameters: MutableMapping[Optimizer, list[Tensor]] = WeakKeyDictionary()
        self._blocks: MutableMapping[Optimizer, list[Block]] = WeakKeyDictionary()
        self._stepped: set[Optimizer] = set()
        self._measured: set[Block] = set()  # those whose gradients have been, in this step
        self._remembered: set[Block] = set()
        self._started: MutableSet[Block] = WeakSet()  # those that have stepped before
        self._collecting: set[Optimizer] = set()
        self._attempted: set[Block] | None = None  # by a step under way: those that it has measured
        self._warned = self._told_left_out = False
        self._skipped = SkippedSteps(recorder)
        self._clipped = ClippedGradients()
        self._clips_parts = False  # whether each micro-batch was clipped in the last step
        self._in_parts = False  # and in this one
        for optimizer in optimizers or ():
            if self._update_blocks(optimizer):
                for block in self._blocks[optimizer]:
                    recorder.activate(block)

    @property
    def stepped(self) -> bool:
        """Whether the step under way has changed parameters."""
        return bool(self._stepped)

    @property
    def measures(self) -> bool:
        """Whether this step is one of those that are measured."""
        return self._statistics and self._recorder.next_is_measured

    def finish(self) -> None:
        """End the step under way, if it has changed parameters."""
        if self._stepped:
            for tag, rate in learning_rates(o for o in self._blocks if o in self._stepped).items():
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
        if not watched or not self._update_blocks(optimizer) or self._is_part():
            return
        if self._attempted is not None:
            self._give_up_attempt()
        blocks = self._blocks[optimizer]
        if optimizer in self._stepped or self._recorder.displaces(blocks):
            self.finish()
        self._recorder.begin()
        self._attempted = set()
        for block in blocks:
            self._recorder.activate(block)
            # Of an optimizer that is new: clipping has measured its gradients as another's.
            if block not in self._measured and any(map(block.shares_with, self._measured)):
                self._measured.add(block)
        if self._statistics:
            for block in blocks:
                if block not in self._started:
                    self._started.add(block)
                    block.find_unfrozen()
                    self._recorder.sketch_start(block)
        self._skipped.before_step(optimizer)
        self._tell_of_scale(optimizer)
        if not self.measures:
            return
        stage = AS_GIVEN if last else BEFORE_HOOKS
        if isinstance(optimizer, AdamW) and self._collect(optimizer, closure, stage):
            return
        if not closure:
            self._measure_gradients(optimizer, stage)
        if self._recorder.next_is_published:
            for block in blocks:
                block.remember_parameters()
                self._remembered.add(block)

    def after_step(self, optimizer: Optimizer, *, closure: bool) -> None:
        if optimizer not in self._blocks or self._is_part():
            return
        self._attempted = None
        self._skipped.after_step(optimizer)
        if isinstance(optimizer, AdamW):
            if optimizer in self._collecting:
                self._store_collected(optimizer)
            if optimizer.max_grad_norm is not None and not self._clipped:
                self._note_limit(optimizer.max_grad_norm, self._blocks[optimizer])
        if closure and self.measures:
            self._measure_gradients(optimizer, AS_GIVEN)
        for block in self._blocks[optimizer]:
            if block in self._remembered:
                self._recorder.store(block, "update", block.measure_updates())
                self._recorder.store(block, "param", block.measure_parameters())
        self._stepped.add(optimizer)
        if self._expected is not None and self._expected <= self._stepped:
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
            self._lay_out_model()
        blocks = [b for b in self._recorder.blocks if not gradients.keys().isdisjoint(b.parameters)]
        if not blocks:
            return None
        if not self._steps_now():  # or it is a closure that clips
            if self._attempted is not None:
                self._give_up_attempt()
            if any(block in self._blocks[o] for o in self._stepped for block in blocks):
                self.finish()  # what has stepped has new gradients
            elif self._clipped.replaced(gradients):
                self._recorder.note_given_up()
                self.finish() if self._stepped else self._end()
            elif self._clipped.accumulated(gradients):
                self._in_parts = True
                self._forget(blocks)
        self._recorder.begin()
        first = not self._clipped
        self._clipped.add(gradients)
        measures = self.measures and not (self._clips_parts or self._in_parts)
        new = [block for block in blocks if measures and block not in self._measured]
        if not new:
            return None
        ours = {p for b in blocks for p in b.parameters if p.grad is not None}
        others = gradients.keys() != ours  # than those of these blocks
        if first and not others:
            self._note_limit(max_norm, blocks)
        norms = [self._measure(block, BEFORE_CLIPPING) for block in new]
        if others or len(norms) < len(blocks) or any(b.incomplete for b in blocks):
            return None
        return norms[0] if len(norms) == 1 else _joint_norm(norms)

    def _forget(self, blocks: Sequence[Block]) -> None:
        """Forget what was measured of these in this step, whose gradients were not complete."""
        if not self._measured.isdisjoint(blocks):
            self._measured.difference_update(blocks)
            self._recorder.restart(("grad",))
            self._recorder.clipped_to(math.nan)

    def _note_limit(self, max_norm: float, blocks: Sequence[Block]) -> None:
        """Note the limit of the norm of `blocks`, if that is the norm that is shown."""
        if len(blocks) == len(self._recorder.blocks) and all(b.shows_all for b in blocks):
            self._recorder.clipped_to(float(max_norm))

    # -- Measuring --------------------------------------------------------------------------------

    def _measure(self, block: Block, stage: str) -> Tensor:
        block.find_unfrozen()
        stats = block.measure_gradients(count=True)
        self._recorder.store(block, "grad", stats)
        self._recorder.find_nonfinite(block, stats)
        self._recorder.measured_at(stage)
        self._measured.add(block)
        return stats.total_norm

    def _measure_gradients(self, optimizer: Optimizer, stage: str) -> None:
        blocks = [block for block in self._blocks[optimizer] if block not in self._measured]
        if blocks and self.measures and unscale(optimizer):
            for block in blocks:
                self._measure(block, stage)
            if self._attempted is not None:
                self._attempted.update(blocks)

    def _collect(self, optimizer: AdamW, closure: bool, stage: str) -> bool:
        """Let the step itself measure what it does, where it can."""
        claimed = optimizer.collecting and optimizer not in self._collecting  # by somebody else
        if claimed or not optimizer.can_collect() or not self._blocks[optimizer]:
            return False
        (block,) = self._blocks[optimizer]
        block.find_unfrozen()
        # It reads the gradients itself for these, and measures them with the same read.
        reads = closure or optimizer.max_grad_norm is not None or optimizer.skip_nonfinite
        grad = reads and block not in self._measured
        if grad:  # and not by a closure that clips, too
            self._measured.add(block)
            if self._attempted is not None:
                self._attempted.add(block)
        else:
            self._measure_gradients(optimizer, stage)
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

    def _store_collected(self, optimizer: AdamW) -> None:
        self._collecting.discard(optimizer)
        collected, optimizer.collected = optimizer.collected, None
        if collected is None:
            return
        (block,) = self._blocks[optimizer]
        if collected.grad is not None:
            self._recorder.store(block, "grad", collected.grad)
            self._recorder.find_nonfinite(block, collected.grad)
            self._recorder.measured_at(AS_GIVEN)
            self._measured.add(block)
        counted = self._recorder.next_is_published
        if collected.update is not None and collected.param is not None:
            self._recorder.store(block, "update", collected.update, counted=counted)
            self._recorder.store(block, "param", collected.param, counted=counted)

    def _tell_of_scale(self, optimizer: Optimizer) -> None:
        """Say so where clipping has measured gradients that a GradScaler still scales."""
        scaled = getattr(optimizer, "grad_scale", None) is not None
        if scaled and not self._measured.isdisjoint(self._blocks[optimizer]):
            self._recorder.measured_at(STILL_SCALED)
            if not self._warned:
                self._warned = True
                _logger.warning(
                    "watch: gradients were clipped, and measured, while they were still scaled; "
                    "call scaler.unscale_(optimizer) before clipping"
                )

    # -- Steps and blocks -------------------------------------------------------------------------

    def _is_part(self) -> bool:
        """Whether the step that calls is part of another: of a subclass's, of a wrapper's."""
        return any(outer in self._blocks for outer in steps_under_way()[1:])

    def _steps_now(self) -> bool:
        """Whether one of the watched optimizers is in the middle of its step."""
        return any(optimizer in self._blocks for optimizer in steps_under_way())

    def _give_up_attempt(self) -> None:
        """Forget what was measured of a step that has raised: it is tried again."""
        counted = bool(self._attempted or self._collecting)
        self._measured -= self._attempted or set()
        clipped = {p: p.grad for b in self._measured for p in b.parameters if p.grad is not None}
        if self._clipped.replaced(clipped):  # not even its gradients are those that were clipped
            self._measured.clear()
            self._clipped.clear()
            counted = True
        if counted:
            self._recorder.restart(KINDS)
        self._attempted = None
        self._remembered.clear()

    def _end(self) -> None:
        self._recorder.end()
        self._stepped.clear()
        self._measured.clear()
        self._remembered.clear()
        self._clipped.clear()
        self._clips_parts, self._in_parts = self._in_parts, False
        self._attempted = None

    def _lay_out_model(self) -> None:
        """Measure the whole model, until it is known whose parameters they are."""
        for device, parameters in self._by_device(self._names).items():
            names = [self._names[parameter] for parameter in parameters]
            kinds = [kind for kind in self._histograms if kind == "grad"]
            self._recorder.activate(Block(parameters, names, device, kinds))

    def _update_blocks(self, optimizer: Optimizer) -> bool:
        """Lay out an optimizer's parameters, again if they have changed; False if none is ours.

        Parameters that are new to us may be new in the model.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known = self._parameters.get(optimizer, [])
        if len(known) == len(parameters) and all(map(operator.is_, known, parameters)):
            return optimizer in self._blocks
        self._parameters[optimizer] = parameters
        for block in self._blocks.pop(optimizer, []):
            self._recorder.retire(block)
        if not all(parameter in self._names for parameter in parameters):
            self._names.refresh()
        if not any(parameter in self._names for parameter in parameters):
            return False
        self._blocks[optimizer] = []
        for device, some in self._by_device(parameters).items():
            names = [self._names.get(parameter) for parameter in some]
            if any(names):
                block = Block(some, names, device, self._histograms)
                self._blocks[optimizer].append(block)
        return True

    def _by_device(self, parameters: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter in parameters:
            by_device.setdefault(parameter.device, []).append(parameter)
        left_out = by_device.pop(_WITHOUT_VALUES, [])
        if left_out and not self._told_left_out:
            self._told_left_out = True
            _logger.warning(
                "watch: parameters on the meta device, which have no values, are left out: %d of "
                "them, %s the first",
                *(len(left_out), self._names.get(left_out[0], "one without a name")),
            )
        return by_device


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float | Tensor]:
    """The first group's, and all others by their number; no tensor is read."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    tags = (GROUP_RATE.format(number) if number else RATE for number in range(len(groups)))
    return {t: g["lr"] for t, g in zip(tags, groups, strict=True) if g.get("lr") is not None}


def _joint_norm(norms: Sequence[Tensor]) -> Tensor:
    # On a GPU if one is there: to bring a norm from it to the CPU would be to wait for it.
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), norms[0].device)
    return torch.stack([norm.to(device, non_blocking=True) for norm in norms]).norm()
