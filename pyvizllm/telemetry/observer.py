"""Takes statistics at the optimizer's own step hooks, and before our clipping."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, MutableMapping, MutableSet, Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.optim import AdamW
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.recorder import AS_GIVEN, BEFORE_CLIPPING, STILL_SCALED, Recorder
from pyvizllm.telemetry.records import Kind
from pyvizllm.telemetry.step_buffer import SKIPPED

_logger = logging.getLogger("pyvizllm")


class StepObserver:
    """Finds out when a step begins and ends, and measures what it does.

    A step is over when all optimizers that step have stepped: those that were given, or, where
    none was, those that stepped in the step before. One that steps again begins a new step, and
    so does one that has the parameters of another.

    Arguments:
        recorder: keeps what is measured.
        overhead: says in which steps to measure.
        names: the watched parameters and their names.
        optimizers: those to watch; None for all that step the watched parameters.
        histograms: the kinds that are counted.
        statistics: whether anything is measured.
    """

    def __init__(
        self,
        recorder: Recorder,
        overhead: Overhead,
        names: WatchedNames,
        optimizers: Sequence[Optimizer] | None,
        histograms: Sequence[Kind],
        statistics: bool = True,
    ) -> None:
        self._recorder, self._overhead = recorder, overhead
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
        self._warned = False
        self._skips: Tensor | None = None  # those that skip_nonfinite counted before the step
        self._clipped: tuple[Tensor, int] | None = None  # a gradient and its version at clipping
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
        if not self._statistics:
            return False
        step = self._recorder.step + 1
        return step % self._overhead.measure_every == 0 or self._recorder.next_is_published

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

    # -- The optimizer's hooks --------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *, closure: bool) -> None:
        """`closure`: the optimizer computes the gradients itself, so they are not there yet."""
        watched = self._learns or optimizer in (self._expected or ())
        if not watched or not self._update_blocks(optimizer):
            return
        blocks = self._blocks[optimizer]
        if optimizer in self._stepped or self._recorder.displaces(blocks):
            self.finish()
        self._recorder.begin()
        for block in blocks:
            # Of an optimizer that is new: clipping has measured its gradients as the old one's.
            if not self._measured.isdisjoint(self._recorder.activate(block)):
                self._measured.add(block)
        if self._statistics:
            for block in blocks:
                if block not in self._started:
                    self._started.add(block)
                    block.find_unfrozen()
                    self._recorder.sketch_start(block)
        self._note_skip(optimizer)
        if not self.measures:
            return
        if isinstance(optimizer, AdamW) and self._collect(optimizer, closure):
            return
        if not closure:
            self._measure_gradients(optimizer)
        if self._recorder.next_is_published:
            for block in blocks:
                block.remember_parameters()
                self._remembered.add(block)

    def after_step(self, optimizer: Optimizer, *, closure: bool) -> None:
        if optimizer not in self._blocks:
            return
        if isinstance(optimizer, AdamW) and optimizer in self._collecting:
            self._store_collected(optimizer)
        if closure and self.measures:
            self._measure_gradients(optimizer)
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

        Gradients that are new, though the last ones were clipped and never stepped with, say that
        a GradScaler has skipped the step between.
        """
        given = set(parameters)
        blocks = [b for b in self._recorder.blocks if not given.isdisjoint(b.parameters)]
        gradient = next((p.grad for p in parameters if p.grad is not None), None)
        if not blocks or gradient is None:
            return None
        if any(block in self._blocks[o] for o in self._stepped for block in blocks):
            self.finish()  # what has stepped has new gradients
        if self._clipped is not None and not self._stepped:
            before, version = self._clipped
            # Ours adds 1 to the version. More than that is a backward's doing.
            if gradient is not before or gradient._version > version + 1:
                self._recorder.note(SKIPPED, torch.ones(()))
                self._end()
        self._recorder.begin()
        self._clipped = gradient, gradient._version
        self._recorder.clipped_to(float(max_norm))
        if not self.measures:
            return None
        norms = [self._measure(b, BEFORE_CLIPPING) for b in blocks if b not in self._measured]
        theirs = {p for p in given if p.grad is not None}
        ours = {p for b in blocks for p in b.parameters if p.grad is not None}
        if len(norms) < len(blocks) or theirs != ours or any(b.incomplete for b in blocks):
            return None
        return norms[0] if len(norms) == 1 else _joint_norm(norms)

    # -- Measuring --------------------------------------------------------------------------------

    def _measure(self, block: Block, stage: str) -> Tensor:
        block.find_unfrozen()
        stats = block.measure_gradients(count=True)
        self._recorder.store(block, "grad", stats)
        self._recorder.find_nonfinite(block, stats)
        self._recorder.measured_at(stage)
        self._measured.add(block)
        return stats.total_norm

    def _measure_gradients(self, optimizer: Optimizer) -> None:
        blocks = [block for block in self._blocks[optimizer] if block not in self._measured]
        if blocks and self.measures and _unscale(optimizer):
            for block in blocks:
                self._measure(block, AS_GIVEN)

    def _collect(self, optimizer: AdamW, closure: bool) -> bool:
        """Let the step itself measure what it does, where it can."""
        if optimizer.collecting or not optimizer.can_collect():
            return False
        (block,) = self._blocks[optimizer]
        block.find_unfrozen()
        if optimizer.skip_nonfinite:
            self._skips = optimizer.skipped_steps.clone()
        # It reads the gradients itself for these, and measures them with the same read.
        reads = closure or optimizer.max_grad_norm is not None or optimizer.skip_nonfinite
        grad = reads and block not in self._measured
        if not grad:
            self._measure_gradients(optimizer)
        elif optimizer.max_grad_norm is not None:
            self._recorder.clipped_to(optimizer.max_grad_norm)
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
        if self._skips is not None:
            now = optimizer.skipped_steps
            # The first count is a 0 of the CPU: to bring that to a GPU waits for nothing.
            self._recorder.note(SKIPPED, now - self._skips.to(now.device, non_blocking=True))
            self._skips = None
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

    def _note_skip(self, optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # of a GradScaler
        if isinstance(found_inf, Tensor):
            self._recorder.note(SKIPPED, found_inf)
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

    def _end(self) -> None:
        self._recorder.end()
        self._stepped.clear()
        self._measured.clear()
        self._remembered.clear()
        self._clipped = None

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
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter in parameters:
            by_device.setdefault(parameter.device, []).append(parameter)
        for device, some in by_device.items():
            names = [self._names.get(parameter) for parameter in some]
            if any(names):
                block = Block(some, names, device, self._histograms)
                self._blocks.setdefault(optimizer, []).append(block)
        return True


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float | Tensor]:
    """The first group's as train/learning_rate; those that differ from it by their number."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    first = groups[0]["lr"] if groups and "lr" in groups[0] else None
    rates = {} if first is None else {"train/learning_rate": first}
    for number, group in enumerate(groups[1:], start=1):
        rate = group.get("lr")
        if rate is not None and (isinstance(rate, Tensor) or rate != first):
            rates[f"learning_rate/group_{number}"] = rate
    return rates


def _unscale(optimizer: Optimizer) -> bool:
    """Divide by a GradScaler's scale what it leaves to the optimizer; False where that cannot be.

    The optimizer is told that it is done, as GradScaler.unscale_ would have.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return True
    by_device: dict[torch.device, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.dtype == torch.float16 or gradient.layout != torch.strided:
                return False  # unscaled, its small values would be 0
            by_device.setdefault(gradient.device, []).append(gradient)
    for device, gradients in by_device.items():
        torch._foreach_div_(gradients, scale.to(device, non_blocking=True))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    return True


def _joint_norm(norms: Sequence[Tensor]) -> Tensor:
    # On a GPU if one is there: to bring a norm from it to the CPU would be to wait for it.
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), norms[0].device)
    return torch.stack([norm.to(device, non_blocking=True) for norm in norms]).norm()
