"""Records optimizer steps on the training thread and hands them over without waiting.

No method reads a device value, or waits for the disk, the device or the publisher's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics, TensorStats
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.histogram_counts import TakenCounts
from pyvizllm.telemetry.interval_sums import LoggedSums
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.publishing import UNLESS_LOGGED, Assembling, Due, Publishing
from pyvizllm.telemetry.records import KINDS, Kind, Publication, is_evaluation
from pyvizllm.telemetry.step_buffer import METRICS_TAG, MOST_STEPS, SKIPPED, MicroBatch, StepBuffer

BEFORE_CLIPPING = "before clipping"
AS_GIVEN = "as the optimizer got them, after any clipping"
BEFORE_HOOKS = "before step hooks of other code, which may have changed them"
STILL_SCALED = "clipped while still scaled by a GradScaler, measured before that"


class Recorder:
    """Keeps what is measured and logged of each step, and publishes every so many steps.

    A step: `begin()`, then `store` and `log` in any order, then `end()`. What is logged after the
    `end` of a step, by loops that do it then, still belongs to it: its publication is then put off
    until the next step begins. While the publisher is behind, intervals go on: nothing is lost.

    Arguments:
        publisher: receives the hand-overs.
        make_assembler: makes what turns steps into publications, from the parameters' names.
        overhead: says how often to publish.
        names: of all parameters in the model's order, which is the order of the statistics.
        start_step: the last step done before this recorder.
        evaluated: adds to a publication of an evaluation what it shows.
    """

    def __init__(
        self,
        publisher: Publisher,
        make_assembler: Callable[[Sequence[str]], Assembling],
        overhead: Overhead,
        *,
        names: Sequence[str] = (),
        start_step: int = 0,
        evaluated: Callable[[Publication], Publication] = lambda publication: publication,
    ) -> None:
        self.step = self._start_step = start_step
        self.blocks: list[Block] = []
        self._publisher, self._overhead = publisher, overhead
        self._publishing = Publishing(
            make_assembler, overhead, names, lambda: publisher.awaited_since
        )
        self._evaluated = evaluated
        self._afterwards: StepBuffer | None = None  # what is logged of a step that is complete
        self._model_order = {name: place for place, name in enumerate(names)}
        self._names: tuple[str, ...] = ()
        self._buffer = self._new_buffer()
        self._retired: list[Block] = []
        self._due = self.under_way = False  # whether a step has begun
        self._micro_batches = 0  # of the last step
        self._unpublished = 0  # steps that are complete, handed over or not
        self._plan()
        self._logged_after: dict[str, bool] = {}  # tag -> whether its loop logs after the step
        self._logged_last: set[str] = set()  # tags that were logged when a step was over
        self._logged_within: set[str] = set()  # and those when some of it was done
        self._stages: set[str] = set()

    # -- A step -----------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Decide what the next step does, once: the publisher's thread changes the intervals."""
        number = self.step + 1
        self.next_is_published = number % self._overhead.every == 0  # it ends an interval
        self.next_is_measured = self.next_is_published or number % self._overhead.measure_every == 0

    def begin(self) -> None:
        """The first sign of a new step: hand over what the last ones have left."""
        self._publish_afterwards()
        if self._due and not self._publisher.is_behind:
            self.publish()
        if self._buffer.full:
            self._hand_over(None)
        if self.next_is_published and not self.under_way:
            self.restart(("param", "update"))  # which could not be published: it shows one step's
        self.under_way = True

    def store(self, block: Block, kind: Kind, stats: TensorStats, *, counted: bool = True) -> None:
        """Keep statistics of the step under way; `counted` if they are in the histograms."""
        self._buffer.store(block, kind, stats, counted=counted)

    def discard(self, block: Block, kind: Kind) -> None:
        """Forget what was stored of the step under way: another block may have its parameters."""
        self._buffer.discard(block, kind)

    def find_nonfinite(self, block: Block, stats: TensorStats) -> None:
        """Note where in the gradients, whose statistics these are, the first NaN or Inf is."""
        self._buffer.find_nonfinite(block, stats)

    def sketch_start(self, block: Block) -> None:
        """Note where the parameters are before their first step."""
        self._buffer.start[block] = block.sketch()

    def sketch(self, block: Block) -> None:
        """Note where the parameters are after a step that is published."""
        self._buffer.sketches[block] = block.sketch()

    def measured_at(self, stage: str) -> None:
        """Say at which stage the gradients of this step were measured."""
        self._stages.add(stage)

    def clipped_to(self, max_norm: float) -> None:
        """Say that the gradients of the step under way are clipped."""
        self._buffer.clipped[self._buffer.row] = max_norm

    def note(self, name: str, value: float | Tensor) -> None:
        """Add what telemetry itself has seen to the step under way."""
        self._buffer.log(name, value, self._buffer.row)

    def note_given_up(self) -> None:
        """The step under way has other gradients than those that were clipped.

        If those were not finite, a GradScaler has skipped the step; of gradients that were not
        measured nothing else is to be expected.
        """
        if self.next_is_measured:
            self._buffer.given_up[self._buffer.row] = True
        else:
            self.note(SKIPPED, 1.0)

    def note_setting(self, name: str, value: float | Tensor) -> None:
        """Add a setting of the step under way, which is shown where the loop logs none itself."""
        self.note(UNLESS_LOGGED + name, value)

    def end(self) -> None:
        """The step is done; publish it if it ends an interval and nothing more is to come."""
        self._micro_batches = len(self._buffer.micro_batches[self._buffer.row])
        self._buffer.end_step()
        self.under_way = False
        self.step += 1
        self._unpublished += 1
        self._due = self._due or self.next_is_published
        self._plan()
        complete = bool(self._logged_after) and not any(self._logged_after.values())
        if self._due and complete and not self._publisher.is_behind:
            self.publish()

    # -- What the loop says -----------------------------------------------------------------------

    def log(self, tag: str, value: float | Tensor, *, stepped: bool) -> None:
        """Add a value to its step; `stepped` if the step under way has changed parameters.

        A tag whose first value comes while no step has ended yet, or when the next one has begun,
        always belongs to the step under way; any other to the step that has ended last. An
        evaluation is of the parameters as they are, and is published by itself.
        """
        row = None if is_evaluation(tag) else self._row_of(tag, stepped)
        if row is None:
            self._afterwards = self._afterwards or StepBuffer(self.step, 1)
            self._afterwards.log(tag, value, 0)
        else:
            self._buffer.log(tag, value, row)

    def log_metrics(self, metrics: CrossEntropyMetrics, *, stepped: bool) -> None:
        """Add a micro-batch's metrics to its step."""
        row = self._row_of(METRICS_TAG, stepped)
        self._buffer.log_metrics(metrics, self._buffer.row if row is None else row)

    def add_micro_batch(self, micro_batch: MicroBatch) -> None:
        """Add one to the step under way."""
        self._buffer.micro_batches[self._buffer.row].append(micro_batch)

    @property
    def last_micro_batch_is_next(self) -> bool:
        """Whether the next micro-batch is the last of its step, if it has as many as the last.

        The second is never called so: the noise scale needs the norms of two.
        """
        number = len(self._buffer.micro_batches[self._buffer.row]) + 1
        return number == self._micro_batches != 2

    @property
    def stepped(self) -> bool:
        """Whether a step is complete."""
        return self.step > self._start_step

    def ends_step(self, tag: str) -> bool:
        """Whether a value of `tag` says that the step under way, some of it done, is over.

        It is of the next one; or its loop logs it when all optimizers have stepped that will.
        """
        before = self._logged_after.get(tag) is False
        last = tag in self._logged_last and tag not in self._logged_within
        return before or last or is_evaluation(tag)

    def logged_within(self, tag: str) -> None:
        """Take note that `tag` is logged between the optimizers of a step."""
        self._logged_within.add(tag)

    def _row_of(self, tag: str, stepped: bool) -> int | None:
        """Where in the buffer its step is, which may be a new one; None: that is published.

        What is logged after a step that was skipped is of the one under way, which it was to be.
        """
        if tag not in self._logged_after:
            self._logged_after[tag] = stepped or (self.stepped and not self.under_way)
        if not self._logged_after[tag]:
            self.begin()
        elif not stepped and self.stepped and not self.under_way:
            self._logged_last.add(tag)
            return None if self._buffer.empty else self._buffer.row - 1
        return self._buffer.row

    # -- Handing over -----------------------------------------------------------------------------

    def publish(self, *, closing: bool = False) -> None:
        """Publish all steps that have not been published, as the last of them.

        While a step is under way that waits for its end; not when `closing`, which leaves that
        step out, and shows the pictures as they are at the end.
        """
        self._publish_afterwards()
        self._due = self.under_way and not closing
        if self._unpublished and not self._due:
            self._publish_steps()
        if closing:
            step = self.step
            self._publisher.submit(lambda: self._publishing.finish(step))

    def _publish_steps(self) -> None:
        with self._overhead.of_publication():
            blocks = [*self.blocks, *self._retired]
            self._hand_over(stage_of(self._stages))
            self._stages.clear()
            self._unpublished = 0
            # After the sinks have written it, the counts are ready to be used again.
            self._publisher.submit(lambda: clean(blocks))

    def _publish_afterwards(self) -> None:
        """Publish what has been logged of a step that is complete, by itself."""
        if self._afterwards is None:
            return
        buffer, self._afterwards = self._afterwards, None
        self._publish_logs(buffer)

    def publish_unfinished(self) -> bool:
        """Publish what has been logged of a step that will not come; whether there was any."""
        if not any(self._buffer.has_logged(tag) for tag in self._logged_after):
            return False
        self._publish_afterwards()
        logs = StepBuffer(self.step + 1, 1)
        logs.take_logs(self._buffer, self._logged_after)
        self._publish_logs(logs)
        return True

    def _publish_logs(self, buffer: StepBuffer) -> None:
        buffer.end_step()
        handed_over = buffer.hand_over(())

        def publication() -> Publication:
            steps = handed_over.read()
            sums = LoggedSums()
            sums.add(steps)
            wall_time = float(steps.wall_times[0])
            return self._evaluated(Publication(steps.first, wall_time, sums.scalars(None)))

        self._publisher.submit(publication)

    @property
    def ready(self) -> bool:
        """Whether a publication could show histograms now: the last ones have been read."""
        blocks = (*self.blocks, *self._retired)
        return all(counts.ready for block in blocks for counts in block.counts.values())

    def displaces(self, blocks: Sequence[Block]) -> bool:
        """Whether `blocks` have parameters of others that are measured now."""
        return any(self._displaced(block) for block in blocks)

    def activate(self, block: Block) -> None:
        """Measure `block`, instead of those that have its parameters."""
        for other in self._displaced(block):
            self.retire(other)
        if block in self._retired:
            self._retired.remove(block)
        if block not in self.blocks:
            self.blocks.append(block)

    def _displaced(self, block: Block) -> list[Block]:
        if block in self.blocks:
            return []
        return [other for other in self.blocks if other.shares_with(block)]

    def retire(self, block: Block) -> None:
        """Measure `block` no more; what it has counted is still published."""
        if block in self.blocks:
            self.blocks.remove(block)
            self._retired.append(block)

    def restart(self, kinds: Sequence[Kind]) -> None:
        """Forget what the histograms of these kinds have counted since they were published."""
        for kind in kinds:
            for block in (*self.blocks, *self._retired):
                if kind in block.counts and block.counts[kind].restart():
                    self._buffer.restart(kind)

    def _hand_over(self, stage: str | None) -> None:
        buffer = self._buffer
        known = self._names
        names = buffer.names(known)
        new = sorted(
            names[len(known) :],
            key=lambda name: self._model_order.get(name, len(self._model_order)),
        )
        self._names = (*known, *new)
        handed_over = buffer.hand_over(self._names)
        due = None
        if stage is not None:
            counts = self._take_counts()
            due = Due(self.step, time.time(), stage, self._overhead.take(), counts)
        self._buffer = self._new_buffer()
        if self.under_way:
            self._buffer.go_on_from(buffer)
        self._publisher.submit(lambda: self._publishing.handle(handed_over, due))

    def _take_counts(self) -> dict[Kind, dict[Block, TakenCounts]]:
        if not self.ready:
            return {}  # the publisher is late: the interval goes on
        blocks, self._retired = [*self.blocks, *self._retired], []
        return {
            kind: taken
            for kind in KINDS
            if (taken := {b: b.counts[kind].take() for b in blocks if kind in b.counts})
        }

    def _new_buffer(self) -> StepBuffer:
        return StepBuffer(self.step + 1, MOST_STEPS)


def clean(blocks: Sequence[Block]) -> None:
    """Make the counts that have been read ready for use again; on the publisher's thread."""
    for block in blocks:
        for counts in block.counts.values():
            counts.clean()


def stage_of(stages: set[str]) -> str:
    """At which stage the gradients of an interval were measured; empty where none were."""
    if len(stages) > 1:
        return "in some steps " + ", in others ".join(sorted(stages, reverse=True))
    return next(iter(stages), "")


def squared_norms(blocks: Sequence[Block]) -> list[Tensor]:
    """[] float64 of each block: of all its gradients as they are now."""
    with torch.no_grad():
        return [block.measure_gradients(count=False).total_norm.square() for block in blocks]
