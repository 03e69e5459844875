"""What a process has of the numbers of sharded parameters, and what parts are together."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyvizllm.ops import BINS
from pyvizllm.ops.first_nonfinite import INDEX_MASK
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.part_exchange import Message, Sending
from pyvizllm.telemetry.records import KINDS, STATISTICS, Counts, Flags, Floats, Kind

if TYPE_CHECKING:
    from pyvizllm.telemetry.publishing import Due
    from pyvizllm.telemetry.step_buffer import HandedOver

Ranks = tuple[int, ...]
_ATTRIBUTES = {"start": "start", "sketch": "sketches"}  # of a StepBuffer, by sketch


class Part:
    """What this process has of the numbers of the parameters that `ranks` have together."""

    def __init__(
        self, ranks: Ranks, blocks: Sequence[Block], handed_over: HandedOver, due: Due | None
    ) -> None:
        self.ranks, self._buffer = ranks, handed_over.buffer
        self.published, self._taken = due is not None, {} if due is None else due.counts
        self._arrays = handed_over.copies.read()
        self._blocks = [block for block in blocks if ranks in block.parts]
        names = sorted({name for block in self._blocks for name in block.parts[ranks]})
        self.names = {name: place for place, name in enumerate(names)}
        shard = next(iter(shard for shard in self._blocks[0].shards.values() if shard.counts))
        self.rank, self.leads = shard.rank, shard.rank == ranks[0]
        self.counts: dict[Kind, Counts] = {}
        """[N, 4096] by kind: of all processes that have taken theirs, once they are added."""
        self.all_counted = bool(self._taken)

    @property
    def digest(self) -> int:
        """The same in all processes that have a part of these parameters."""
        return zlib.crc32(repr((self.ranks, list(self.names))).encode())

    @property
    def sending(self) -> Sending:
        """What was handed over."""
        first, steps = self._buffer.first, self._buffer.row
        published = "-published" if self.published else ""
        return Sending(f"{first}-{steps}{published}", 2 * (first + steps) + self.published)

    def message(self) -> Message:
        """For the process that shows the whole."""
        message = {"statistics": self._statistics(), "found": self._found()}
        message |= {which: self._sketch(which) for which in _ATTRIBUTES}
        for kind in self._taken:
            counts = self._own_counts(kind)
            bins = np.flatnonzero(counts)
            message |= {f"{kind}_bins": bins, f"{kind}_counts": counts.ravel()[bins]}
        return message

    def add(self, others: Iterable[Message]) -> bool:
        """Add the parts of all others to what was handed over; False: they are of other steps."""
        whole, found = self._statistics(), self._found()
        sketches = {which: self._sketch(which) for which in _ATTRIBUTES}
        self.counts = {kind: self._own_counts(kind) for kind in self._taken}
        for other in others:
            if other["statistics"].shape != self._shape:
                return False
            whole = merged(whole, other["statistics"])
            found = _earliest(found, other["found"])
            sketches = {which: sketches[which] + other[which] for which in _ATTRIBUTES}
            self._add_counts(other)
        whole = np.where(whole[:, :, None, STATISTICS.index("numel")] > 0, whole, 0.0)
        for block, mine, places, new in self._rows(self._buffer.statistics):
            self._arrays[block][..., mine] = np.where(new, whole[..., places], 0.0)
            if ("found", block) in self._arrays:
                self._arrays["found", block][mine] = np.where(new, found[places], -1)
        for which in _ATTRIBUTES:
            for block, mine, places, _ in self._rows(getattr(self._buffer, _ATTRIBUTES[which])):
                self._arrays[which, block][mine] = sketches[which][places]
        return True

    def write_counts(self) -> None:
        """Put the counts of the wholes in the place of this process's."""
        for kind, taken in self._taken.items():
            for block, mine, places, new in self._rows(taken):
                taken[block].read()[mine] = np.where(new[:, None], self.counts[kind][places], 0)

    def _add_counts(self, other: Message) -> None:
        kinds = [kind for kind in KINDS if f"{kind}_bins" in other]
        self.all_counted &= kinds == [kind for kind in KINDS if kind in self._taken]
        for kind in kinds:
            if kind not in self.counts:
                self.counts[kind] = self._no_counts()
            self.counts[kind].reshape(-1)[other[f"{kind}_bins"]] += other[f"{kind}_counts"]

    def _own_counts(self, kind: Kind) -> Counts:
        counts, taken = self._no_counts(), self._taken[kind]
        for block, mine, places, _ in self._rows(taken):
            counts[places] += taken[block].read()[mine]
        return counts

    def _no_counts(self) -> Counts:
        return np.zeros((len(self.names), BINS), dtype=np.int64)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self._buffer.row, len(KINDS), len(STATISTICS), len(self.names)

    def _rows(self, blocks: Mapping[Block, object]) -> list[tuple[Block, Counts, Counts, Flags]]:
        """The rows of those of `blocks` that have a part, and their places among the names.

        A name has two rows where an optimizer's parameters have changed: only one of them is new.
        """
        rows, seen = [], set[str]()
        for block in self._blocks:
            if block in blocks:
                mine = block.parts[self.ranks]
                places = np.array([self.names[name] for name in mine])
                new = np.array([name not in seen for name in mine])
                rows.append((block, np.array(list(mine.values())), places, new))
                seen |= mine.keys()
        return rows

    def _statistics(self) -> Floats:
        whole = np.zeros(self._shape)
        for block, mine, places, _ in self._rows(self._buffer.statistics):
            whole[..., places] = merged(whole[..., places], self._arrays[block][..., mine])
        return whole

    def _found(self) -> Counts:
        found = np.full(len(self.names), -1, dtype=np.int64)
        for block, mine, places, _ in self._rows(self._buffer.found):
            own = self._arrays["found", block][mine].astype(np.int64)
            for i in np.flatnonzero(own >= 0):
                index = block.shards[mine[i]].index_in_whole(int(own[i]) & INDEX_MASK)
                own[i] = -1 if index is None else int(own[i]) & ~INDEX_MASK | index
            found[places] = _earliest(found[places], own)
        return found

    def _sketch(self, which: str) -> Floats:
        """[N, 64]: NaN of a parameter of which it was not taken."""
        sketch = np.full((len(self.names), 64), np.nan)
        for block, mine, places, _ in self._rows(getattr(self._buffer, _ATTRIBUTES[which])):
            sketch[places] = self._arrays[which, block][mine]
        return sketch


def merged(one: Floats, other: Floats) -> Floats:
    """[..., 12, N] of two parts of N tensors: those of both together."""
    rows = {name: STATISTICS.index(name) for name in STATISTICS}
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf stay what they are
        whole = one + other
        for name, extreme, neutral in (("min", np.minimum, np.inf), ("max", np.maximum, -np.inf)):
            measured = (
                np.where(part[..., rows["numel"], :] > 0, part[..., rows[name], :], neutral)
                for part in (one, other)
            )
            whole[..., rows[name], :] = extreme(*measured)
        index = rows["abs_max"]
        whole[..., index, :] = np.maximum(one[..., index, :], other[..., index, :])
        whole[..., rows["norm"], :] = np.sqrt(whole[..., rows["sum_squares"], :])
    return whole


def _earliest(one: Counts, other: Counts) -> Counts:
    """[N]: of two parts, the NaN or Inf that was found first; -1 where there is none."""
    return np.where((one < 0) | (other >= 0) & (other < one), other, one)
