"""From the numbers of sharded parameters' parts to those of the whole; publisher's thread only."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyvizllm.ops.first_nonfinite import INDEX_MASK
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.part_exchange import Message, PartExchange
from pyvizllm.telemetry.records import KINDS, STATISTICS, Counts, Floats

if TYPE_CHECKING:
    from pyvizllm.telemetry.publishing import Due
    from pyvizllm.telemetry.step_buffer import HandedOver

Ranks = tuple[int, ...]
_SKETCHES = ("start", "sketch")
_logger = logging.getLogger("pyvizllm")


class Wholes:
    """Sends the parts that others show, and adds theirs to those that this process shows.

    Parts go together that are of the same steps. Where a process has handed over others, or
    nothing, the parameters that it has a part of are left out of these steps: an interval later
    all have the same again.
    """

    def __init__(self) -> None:
        self._exchange = PartExchange()
        self._counted_from: dict[Ranks, int] = {}  # the step after which histograms have begun
        self._incomplete: set[Ranks] = set()  # whose histograms lack others' parts
        self._run: dict[Ranks, int] = {}  # the number of this watch among those of the process
        self._broken = self._told = False

    def complete(self, handed_over: HandedOver, due: Due | None) -> None:
        """Make the hand-over's numbers, and the counts of a publication, those of the whole."""
        counts = {} if due is None else due.counts
        blocks = dict.fromkeys(handed_over.buffer.statistics)
        for kind in counts:
            blocks |= dict.fromkeys(counts[kind])
        for ranks in dict.fromkeys(ranks for block in blocks for ranks in block.parts):
            if len(ranks) > 1:
                part = _Part(ranks, list(blocks), handed_over, due, self._begin(ranks, due))
                self._exchange_parts(part, handed_over, due)

    def _begin(self, ranks: Ranks, due: Due | None) -> int:
        begin = self._counted_from.setdefault(ranks, -1)
        if due is not None and due.counts:
            self._counted_from[ranks] = due.step
        return begin

    def _exchange_parts(self, part: _Part, handed_over: HandedOver, due: Due | None) -> None:
        others: list[Message] | None = None
        try:
            others = None if self._broken else self._others(part)
        except Exception as error:  # whatever the store raises
            self._broken = True
            _logger.warning("watch: parts of sharded parameters are sent no more: %r", error)
        if not part.leads:
            return
        if others is not None and all(map(part.fits, others)):
            part.add(others)
        else:
            others = None
            self._incomplete.add(part.ranks)
            self._leave_out(part, handed_over)
        if due is not None and due.counts:
            missed = others is None or part.ranks in self._incomplete
            if missed or not part.add_counts(others or ()):
                handed_over.uncounted |= part.names.keys()
            self._incomplete.discard(part.ranks)

    def _others(self, part: _Part) -> list[Message] | None:
        """The parts of all others, where this process shows the whole; else it sends its own."""
        exchange, digest = self._exchange, part.digest
        if part.ranks not in self._run:
            mine = f"pyvizllm/{digest:x}/{part.rank}"
            self._run[part.ranks] = exchange.number(mine)
        key = f"pyvizllm/{digest:x}/{self._run[part.ranks]}/{part.key}"
        if part.leads:
            return exchange.receive([f"{key}/{rank}" for rank in part.ranks[1:]])
        exchange.send(f"{key}/{part.rank}", part.message())
        return None

    def _leave_out(self, part: _Part, handed_over: HandedOver) -> None:
        handed_over.absent |= part.names.keys()
        if not self._told and not self._broken:
            self._told = True
            _logger.warning(
                "watch: %d sharded parameters are left out of steps %d to %d: their parts have not "
                "come in time from all of the processes %s; each has to watch them, with the same "
                "`every`, and to take the same steps",
                *(len(part.names), handed_over.buffer.first),
                handed_over.buffer.first + handed_over.buffer.row - 1,
                ", ".join(map(str, part.ranks)),
            )


class _Part:
    """What this process has of the numbers of the parameters that `ranks` have together."""

    def __init__(
        self,
        ranks: Ranks,
        blocks: Sequence[Block],
        handed_over: HandedOver,
        due: Due | None,
        counted_from: int,
    ) -> None:
        self.ranks, self._buffer = ranks, handed_over.buffer
        self._due, self._counted_from = due, counted_from
        self._arrays = handed_over.copies.read()
        self._blocks = [block for block in blocks if ranks in block.parts]
        names = sorted({name for block in self._blocks for name in block.parts[ranks]})
        self.names = {name: place for place, name in enumerate(names)}
        shard = next(iter(shard for shard in self._blocks[0].shards.values() if shard.counts))
        self.rank, self.leads = shard.rank, shard.rank == ranks[0]

    @property
    def digest(self) -> int:
        """The same in all processes that have a part of these parameters."""
        return zlib.crc32(repr((self.ranks, list(self.names))).encode())

    @property
    def key(self) -> str:
        """What was handed over."""
        published = "" if self._due is None else "-published"
        return f"{self._buffer.first}-{self._buffer.row}{published}"

    def message(self) -> Message:
        """For the process that shows the whole."""
        message = {"statistics": self._statistics(), "found": self._found()}
        message |= {which: self._sketch(which) for which in _SKETCHES}
        message["counted_from"] = np.array(self._counted_from)
        for kind, taken in ({} if self._due is None else self._due.counts).items():
            counts = np.zeros((len(self.names), 4096), dtype=np.int64)
            for block, mine, places in self._rows(taken):
                counts[places] += taken[block].read()[mine]
            bins = np.flatnonzero(counts)
            message |= {f"{kind}_bins": bins, f"{kind}_counts": counts.ravel()[bins]}
        return message

    def fits(self, other: Message) -> bool:
        """Whether it is of as many steps and parameters."""
        return other["statistics"].shape == self._shape

    def add(self, others: Sequence[Message]) -> None:
        """Add the parts of all others to what was handed over."""
        whole, found = self._statistics(), self._found()
        for other in others:
            whole = merged(whole, other["statistics"])
            found = _earliest(found, other["found"])
        whole = np.where(whole[:, :, None, STATISTICS.index("numel")] > 0, whole, 0.0)
        seen: set[str] = set()
        for block, mine, places in self._rows(self._buffer.statistics):
            new = np.array([name not in seen for name in block.parts[self.ranks]])
            # A name has two rows where an optimizer's parameters have changed: all is in the first.
            self._arrays[block][..., mine] = np.where(new, whole[..., places], 0.0)
            if ("found", block) in self._arrays:
                self._arrays["found", block][mine] = np.where(new, found[places], -1)
            seen |= block.parts[self.ranks].keys()
        for which in _SKETCHES:
            total = sum((other[which] for other in others), self._sketch(which))
            for block, mine, places in self._rows(getattr(self._buffer, _ATTRIBUTES[which])):
                self._arrays[which, block][mine] = total[places]

    def add_counts(self, others: Sequence[Message]) -> bool:
        """Add others' counts to those of a publication; False if they are not of the same steps."""
        taken_by_kind = {} if self._due is None else self._due.counts
        keys = {f"{kind}_bins" for kind in taken_by_kind}
        if not all(
            keys <= other.keys() and int(other["counted_from"]) == self._counted_from
            for other in others
        ):
            return False
        for kind, taken in taken_by_kind.items():
            seen: set[str] = set()
            total = np.zeros((len(self.names), 4096), dtype=np.int64)
            for other in others:
                total.reshape(-1)[other[f"{kind}_bins"]] += other[f"{kind}_counts"]
            for block, mine, places in self._rows(taken):
                new = np.array([name not in seen for name in block.parts[self.ranks]])
                taken[block].read()[mine[new]] += total[places[new]]
                seen |= block.parts[self.ranks].keys()
        return True

    @property
    def _shape(self) -> tuple[int, ...]:
        return self._buffer.row, len(KINDS), len(STATISTICS), len(self.names)

    def _rows(self, blocks: Mapping[Block, object]) -> list[tuple[Block, Counts, Counts]]:
        """The rows of those of `blocks` that have a part, and their places among the names."""
        return [
            (
                block,
                np.array(list(block.parts[self.ranks].values())),
                np.array([self.names[name] for name in block.parts[self.ranks]]),
            )
            for block in self._blocks
            if block in blocks
        ]

    def _statistics(self) -> Floats:
        whole = np.zeros(self._shape)
        for block, mine, places in self._rows(self._buffer.statistics):
            whole[..., places] = merged(whole[..., places], self._arrays[block][..., mine])
        return whole

    def _found(self) -> Counts:
        found = np.full(len(self.names), -1, dtype=np.int64)
        for block, mine, places in self._rows(self._buffer.found):
            own = self._arrays["found", block][mine].astype(np.int64)
            for i in np.flatnonzero(own >= 0):
                index = block.shards[mine[i]].index_in_whole(int(own[i]) & INDEX_MASK)
                own[i] = -1 if index is None else int(own[i]) & ~INDEX_MASK | index
            found[places] = _earliest(found[places], own)
        return found

    def _sketch(self, which: str) -> Floats:
        """[N, 64]: NaN of a parameter of which it was not taken."""
        sketch = np.full((len(self.names), 64), np.nan)
        for block, mine, places in self._rows(getattr(self._buffer, _ATTRIBUTES[which])):
            sketch[places] = self._arrays[which, block][mine]
        return sketch


_ATTRIBUTES = {"start": "start", "sketch": "sketches"}


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
