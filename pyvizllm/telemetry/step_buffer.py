"""The statistics of some steps, on the devices where they arise, until they are handed over."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics, TensorStats
from pyvizllm.ops.first_nonfinite import INDEX_MASK
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.host_copies import HostCopies
from pyvizllm.telemetry.records import (
    KINDS,
    STATISTICS,
    Counts,
    Flags,
    Floats,
    Kind,
    MicroBatches,
    Steps,
)

MOST_STEPS = 64  # of a buffer: what is not published yet is at least handed over
_VALUES = 7  # rows of TensorStats.values; those of TensorStats.counts come after
Places = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)
Rows = TypeVar("Rows", np.ndarray, Tensor)
SKIPPED = "skipped"  # no tag: tags have a slash
METRICS_TAG = "metrics"  # likewise
RATE, GROUP_RATE = "train/learning_rate", "learning_rate/group_{}"


@dataclass
class MicroBatch:
    """One micro-batch of a step; its tensors are [] float64 on their devices."""

    loss: Tensor | float | None
    squared_norms: list[Tensor]  # of each block; empty where they were not measured
    size: Tensor | int | None
    sample_ids: object

    def tensors(self) -> list[Tensor]:
        """Those of its numbers that are on devices."""
        numbers = self.loss, self.size, *self.squared_norms
        return [number for number in numbers if isinstance(number, Tensor)]


class StepBuffer:
    """What the training thread records of up to `size` steps, the first of them number `first`."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size
        self.row = 0  # that of the step which is under way; and how many steps are complete
        self.statistics: dict[Block, Tensor] = {}  # each [size, 3, 12, T] float64
        self.measured: set[Kind] = set()
        self.counted: dict[Kind, Flags] = {kind: np.zeros(size, dtype=bool) for kind in KINDS}
        self.restarted: set[Kind] = set()  # kinds whose counts from before this buffer are void
        self.wall_times = np.zeros(size)
        self.clipped = np.full(size, np.nan)
        self.given_up: Flags = np.zeros(size, dtype=bool)  # skipped, if gradients were not finite
        self.micro_batches: list[list[MicroBatch]] = [[] for _ in range(size)]
        self.found: dict[Block, Tensor] = {}  # each [T] int64, see first_nonfinite_
        self.start: dict[Block, Tensor] = {}  # sketches [T, 64] of parameters before they train
        self.sketches: dict[Block, Tensor] = {}  # and after the last step of this buffer
        self._logs: dict[str, np.ndarray] = {}  # tag -> [size] int: how often it was logged
        self._numbers: dict[str, Floats] = {}  # tag -> [size]: sums of numbers
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}  # sums of tensors
        self._metrics: dict[torch.device, Tensor] = {}  # [size, 53] float64
        self._has_metrics: Flags = np.zeros(size, dtype=bool)

    @property
    def full(self) -> bool:
        return self.row == self.size

    @property
    def empty(self) -> bool:
        return self.row == 0

    def store(self, block: Block, kind: Kind, stats: TensorStats, *, counted: bool) -> None:
        """Keep what was measured in the step that is under way."""
        if block not in self.statistics:
            shape = (self.size, len(KINDS), len(STATISTICS), len(block.parameters))
            if block.device.type == "cpu":  # pages that cost nothing until they are touched
                self.statistics[block] = torch.from_numpy(np.zeros(shape))
            else:
                self.statistics[block] = torch.zeros(
                    shape, dtype=torch.float64, device=block.device
                )
        row = self.statistics[block][self.row, KINDS.index(kind)]
        row[:_VALUES].copy_(stats.values)
        row[_VALUES:].copy_(stats.counts)
        self.measured.add(kind)
        if counted and kind in block.counts:
            self.counted[kind][self.row] = True

    def discard(self, block: Block, kind: Kind) -> None:
        """Forget what was measured in the step that is under way."""
        if block in self.statistics:
            self.statistics[block][self.row, KINDS.index(kind)].zero_()

    def restart(self, kind: Kind) -> None:
        """What the histograms of this kind have counted before is not in them any more."""
        self.counted[kind][:] = False
        self.restarted.add(kind)

    def find_nonfinite(self, block: Block, stats: TensorStats) -> None:
        """Note where the first NaN or Inf of the gradients of the step under way is."""
        if block not in self.found:
            shape = (len(block.parameters),)
            self.found[block] = torch.full(shape, -1, dtype=torch.int64, device=block.device)
        block.find_nonfinite(stats, self.found[block], self.row)

    def log(self, tag: str, value: float | Tensor, row: int) -> None:
        """Add `value` to what was logged as `tag` in the step of `row`."""
        if tag not in self._logs:
            self._logs[tag] = np.zeros(self.size, dtype=np.int64)
        self._logs[tag][row] += 1
        if isinstance(value, Tensor):
            key = (tag, value.device)
            if key not in self._tensors:
                self._tensors[key] = _zeros(self.size, value.device)
            value = value.detach()
            self._tensors[key][row].add_(value.reshape(()) if value.dim() else value)
        else:
            if tag not in self._numbers:
                self._numbers[tag] = np.zeros(self.size)
            self._numbers[tag][row] += float(value)

    def has_logged(self, tag: str) -> bool:
        """Whether something was logged as `tag`, or "metrics", in the step that is under way."""
        if tag == METRICS_TAG:
            return not self.full and bool(self._has_metrics[self.row])
        return not self.full and tag in self._logs and bool(self._logs[tag][self.row])

    def log_metrics(self, metrics: CrossEntropyMetrics, row: int) -> None:
        sums = metrics.sums.detach()
        if sums.device not in self._metrics:
            self._metrics[sums.device] = _zeros((self.size, len(sums)), sums.device)
        self._metrics[sums.device][row].add_(sums)
        self._has_metrics[row] = True

    def end_step(self) -> None:
        self.wall_times[self.row] = time.time()
        self.row += 1

    def go_on_from(self, before: StepBuffer) -> None:
        """Begin with the step under way in `before`, which has been handed over without it."""
        row = before.row
        self.measured |= before.measured  # but it is not counted here: its counts are gone
        self.clipped[0], self.micro_batches[0] = before.clipped[row], before.micro_batches[row]
        self.take_logs(before, before._logs)
        self.statistics = {b: _first(some, row, self.size) for b, some in before.statistics.items()}

    def take_logs(self, before: StepBuffer, tags: Collection[str]) -> None:
        """Begin with what was logged of `tags`, and the metrics, of `before`'s step under way."""
        row, size = before.row, self.size
        logs, numbers, tensors = before._logs, before._numbers, before._tensors
        self._logs = {t: _first(logs[t], row, size) for t in logs if t in tags}
        self._numbers = {t: _first(numbers[t], row, size) for t in numbers if t in tags}
        self._tensors = {k: _first(tensors[k], row, size) for k in tensors if k[0] in tags}
        self._metrics = {k: _first(sums, row, size) for k, sums in before._metrics.items()}
        self._has_metrics = _first(before._has_metrics, row, size)

    def names(self, known: Sequence[str]) -> tuple[str, ...]:
        """`known`, and after them the names that are new, in the order of the blocks."""
        shown = [name for block in self.statistics for name in block.names if name is not None]
        return tuple(dict.fromkeys([*known, *shown]))

    def hand_over(self, names: Sequence[str]) -> HandedOver:
        """Begin the copies to the host; the training thread uses this buffer no more."""
        tensors: dict[object, Tensor] = {
            **{block: tensor[: self.row] for block, tensor in self.statistics.items()},
            **{("scalar", *key): tensor for key, tensor in self._tensors.items()},
            **{("metrics", device): tensor for device, tensor in self._metrics.items()},
            **{("found", block): tensor for block, tensor in self.found.items()},
            **{("start", block): tensor for block, tensor in self.start.items()},
            **{("sketch", block): tensor for block, tensor in self.sketches.items()},
        }
        numbers: dict[torch.device, list[Tensor]] = {}
        for micro_batch in itertools.chain(*self.micro_batches[: self.row]):
            for number in micro_batch.tensors():
                numbers.setdefault(number.device, []).append(number)
        # One copy for all of them: on a GPU each would have its own pinned memory.
        tensors |= {("numbers", device): torch.stack(some) for device, some in numbers.items()}
        rows = {block: list(block.names) for block in self.statistics}
        return HandedOver(self, tuple(names), rows, HostCopies(tensors))


@dataclass
class HandedOver:
    """A buffer on its way to the host."""

    buffer: StepBuffer
    names: tuple[str, ...]
    rows: Mapping[Block, Sequence[str | None]]
    copies: HostCopies[object]
    absent: set[str] = field(default_factory=set)  # sharded parameters whose parts did not all come
    uncounted: set[str] = field(default_factory=set)  # likewise, of the histograms alone
    waiting: set[str] = field(default_factory=set)  # of these, those whose gradients still will be

    def shown(self, names: Sequence[str | None]) -> list[str | None]:
        """The names of a block's rows without those that are absent."""
        return [None if name in self.absent else name for name in names]

    def sketch(self, which: Literal["start", "sketch"]) -> Floats | None:
        """[T, 64] of the parameters before or after the steps, where it was taken.

        NaN of a parameter of which it was not; Inf of one that is not finite.
        """
        arrays = self.copies.read()
        blocks = list(self.buffer.start if which == "start" else self.buffer.sketches)
        if not blocks:
            return None
        joined = np.concatenate([arrays[which, block] for block in blocks])
        places, rows = order_of([self.shown(block.names) for block in blocks], self.names)
        sketch = np.full((len(self.names), joined.shape[1]), np.nan)
        sketch[places] = np.where(np.isfinite(joined), joined, np.inf)[rows]
        return sketch

    def _bad_index(self, arrays: Mapping[object, Floats]) -> Counts | None:
        blocks = list(self.buffer.found)
        found = [arrays["found", block] for block in blocks]
        if not any((part >= 0).any() for part in found):
            return None
        index = np.full(len(self.names), -1, dtype=np.int64)
        places, rows = order_of([self.shown(block.names) for block in blocks], self.names)
        joined = np.concatenate(found)[rows]
        bad = joined >= 0
        index[places[bad]] = joined[bad].astype(np.int64) & INDEX_MASK
        return index

    def read(self) -> Steps:
        """Wait for the copies and put the steps together, on the publisher's thread."""
        buffer, arrays = self.buffer, self.copies.read()
        n = buffer.row
        statistics: dict[Kind, Floats] = {}
        places, rows = order_of([self.shown(rows) for rows in self.rows.values()], self.names)
        for index, kind in enumerate(KINDS):
            if kind not in buffer.measured:
                continue
            parts = [arrays[block][:, index] for block in self.rows]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
            statistics[kind] = arranged(joined, places, rows, len(self.names), axis=2)
        scalars, logged = self._scalars(arrays)
        skipped = self._skipped(arrays, scalars.pop(SKIPPED, None))
        metrics = [
            a[:n] for key, a in arrays.items() if isinstance(key, tuple) and key[0] == "metrics"
        ]
        logged.pop(SKIPPED, None)
        return Steps(
            first=buffer.first,
            names=self.names,
            statistics=statistics,
            wall_times=buffer.wall_times[:n],
            scalars=scalars,
            logged=logged,
            metrics=np.sum(metrics, axis=0) if metrics else None,
            skipped=skipped,
            clipped=None if np.isnan(buffer.clipped[:n]).all() else buffer.clipped[:n],
            bad_index=self._bad_index(arrays),
            micro_batches=self._micro_batches(arrays),
        )

    def _skipped(self, arrays: Mapping[object, Floats], noted: Floats | None) -> Flags | None:
        """[n]: steps that have changed nothing; None where nobody has said anything of any."""
        given_up = self.buffer.given_up[: self.buffer.row]
        if noted is None and not given_up.any():
            return None
        bad = [STATISTICS.index(name) for name in ("nans", "pos_infs", "neg_infs")]
        counts = sum(arrays[b][:, KINDS.index("grad"), bad].sum(axis=(1, 2)) for b in self.rows)
        skipped: Flags = given_up & (counts > 0)
        return skipped if noted is None else skipped | (noted > 0)

    def _scalars(
        self, arrays: Mapping[object, Floats]
    ) -> tuple[dict[str, Floats], dict[str, Flags]]:
        n = self.buffer.row
        scalars, logged = {}, {}
        for tag, times in self.buffer._logs.items():
            total = self.buffer._numbers.get(tag, np.zeros(self.buffer.size))[:n].copy()
            for key, values in arrays.items():
                if isinstance(key, tuple) and key[:2] == ("scalar", tag):
                    total += values[:n]
            logged[tag] = times[:n] > 0
            scalars[tag] = total / np.maximum(times[:n], 1)
        return scalars, logged

    def _micro_batches(self, arrays: Mapping[object, Floats]) -> MicroBatches | None:
        steps = self.buffer.micro_batches[: self.buffer.row]
        most = max((len(step) for step in steps), default=0)
        if most == 0:
            return None
        shape = (len(steps), most)
        losses, norms = np.full(shape, np.nan), np.full(shape, np.nan)
        seen, sizes = np.zeros(shape, dtype=bool), np.full(shape, -1, dtype=np.int64)
        ids: list[list[object]] = [[None] * most for _ in steps]
        numbers = {
            key[1]: iter(values.tolist())
            for key, values in arrays.items()
            if isinstance(key, tuple) and key[0] == "numbers"
        }

        def read(number: Tensor | float | None) -> float | None:
            return next(numbers[number.device]) if isinstance(number, Tensor) else number

        for row, step in enumerate(steps):
            for number, item in enumerate(step):
                seen[row, number] = True
                loss, size = read(item.loss), read(item.size)  # in the order of `tensors`
                squares = [next(numbers[norm.device]) for norm in item.squared_norms]
                losses[row, number] = np.nan if loss is None else loss
                sizes[row, number] = -1 if size is None else _whole(size)
                if squares:
                    norms[row, number] = sum(squares)
                ids[row][number] = item.sample_ids
            # The last one's gradients are those that the step itself measured.
            if step and not step[-1].squared_norms and "grad" in self.buffer.measured:
                norms[row, len(step) - 1] = self._step_norm(arrays, row)
        return MicroBatches(losses, seen, norms, sizes, ids)

    def _step_norm(self, arrays: Mapping[object, Floats], row: int) -> float:
        squares = [arrays[block][row, KINDS.index("grad")] for block in self.rows]
        rows = STATISTICS.index("sum_squares"), STATISTICS.index("numel")
        if not any(part[rows[1]].any() for part in squares):
            return float("nan")  # nothing was measured in this step
        return float(sum(part[rows[0]].sum() for part in squares))


def _whole(size: float) -> int:
    """The size of a micro-batch; -1 where a tensor holds what is none."""
    return int(size) if abs(size) < 2**63 else -1  # NaN is not below


def order_of(blocks: Sequence[Sequence[str | None]], names: Sequence[str]) -> tuple[Places, Places]:
    """(places among `names`, rows of all blocks one after the other) of what is shown."""
    place_of = {name: place for place, name in enumerate(names)}
    all_rows = [name for rows in blocks for name in rows]
    pairs = [(place_of[n], row) for row, n in enumerate(all_rows) if n in place_of]
    places, rows = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return places, rows


def arranged(
    values: NDArray[Number], places: Places, rows: Places, count: int, axis: int
) -> NDArray[Number]:
    """`rows` of `values` along `axis`, added up at `places` of `count`.

    A place has two rows where an optimizer's parameters have changed: at a step, one of them is 0.
    """
    if len(places) == count == len(np.unique(places)):  # each has one row
        order = np.empty_like(rows)
        order[places] = rows
        as_it_is = values.shape[axis] == count and np.array_equal(order, np.arange(count))
        return values if as_it_is else values.take(order, axis)
    shape = list(values.shape)
    shape[axis] = count
    result = np.zeros(shape, dtype=values.dtype)
    source, target = np.moveaxis(values, axis, 0), np.moveaxis(result, axis, 0)
    _, firsts = np.unique(places, return_index=True)
    target[places[firsts]] = source[rows[firsts]]
    for again in np.setdiff1d(np.arange(len(places)), firsts):
        target[places[again]] += source[rows[again]]
    return result


def _first(rows: Rows, row: int, size: int) -> Rows:
    """Zeros of `size` rows, but for the first one, which is that one of `rows`."""
    shape = (size, *rows.shape[1:])
    moved = rows.new_zeros(shape) if isinstance(rows, Tensor) else np.zeros(shape, rows.dtype)
    moved[0] = rows[row]
    return moved


def _zeros(shape: int | tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)
