"""From the numbers of sharded parameters' parts to those of the whole; publisher's thread only."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyvizllm.ops import BINS
from pyvizllm.ops.first_nonfinite import INDEX_MASK
from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.part_exchange import Message, MissingPartError, PartExchange, Sending
from pyvizllm.telemetry.records import KINDS, STATISTICS, Counts, Flags, Floats, Kind

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
    all have the same again. A process whose publisher is late takes its counts of gradients a
    publication later than the others; they wait for it.

    Arguments:
        awaited: since when somebody waits for this thread, which then waits less for others; or
            None.
    """

    def __init__(self, awaited: Callable[[], float | None] = lambda: None) -> None:
        self._exchange = PartExchange(awaited)
        self._waiting: dict[Ranks, _Waiting] = {}  # counts that not all have taken yet
        self._incomplete: set[Ranks] = set()  # whose histograms lack others' parts
        self._run: dict[Ranks, int] = {}  # the number of this watch among those of the process
        self._broken = self._told = False

    def complete(self, handed_over: HandedOver, due: Due | None) -> None:
        """Make the hand-over's numbers, and the counts of a publication, those of the whole."""
        counts = {} if due is None else due.counts
        blocks = dict.fromkeys(handed_over.buffer.statistics)
        for kind in counts:
            blocks |= dict.fromkeys(counts[kind])
        if "grad" in handed_over.buffer.restarted:
            self._waiting.clear()
        for ranks in dict.fromkeys(ranks for block in blocks for ranks in block.parts):
            if len(ranks) > 1:
                part = _Part(ranks, list(blocks), handed_over, due)
                whole = self._exchange_part(part)
                if part.leads:
                    self._show(part, whole, handed_over)

    def _exchange_part(self, part: _Part) -> bool:
        """Send it, or add to it those of all others, where this process shows the whole."""
        if self._broken:
            return False
        exchange, name = self._exchange, f"pyvizllm/{part.digest:x}"
        try:
            if part.ranks not in self._run:
                self._run[part.ranks] = exchange.number(f"{name}/{part.rank}")
            name = f"{name}/{self._run[part.ranks]}"
            if part.leads:
                others = [f"{name}/{rank}" for rank in part.ranks[1:]]
                return part.add(exchange.receive(others, part.sending))
            exchange.send(f"{name}/{part.rank}", part.sending, part.message())
        except MissingPartError:
            pass
        except Exception as error:  # whatever the store raises
            self._broken = True
            _logger.warning("watch: parts of sharded parameters are sent no more: %r", error)
        return False

    def _show(self, part: _Part, whole: bool, handed_over: HandedOver) -> None:
        if not whole:
            self._incomplete.add(part.ranks)
            handed_over.absent |= part.names.keys()
            self._tell(part, handed_over)
        if part.published:
            self._show_counts(part, whole, handed_over)

    def _show_counts(self, part: _Part, whole: bool, handed_over: HandedOver) -> None:
        """Show the counts of a publication, or let them wait until all have taken theirs."""
        ranks, names, counts = part.ranks, tuple(part.names), part.counts
        before = self._waiting.pop(ranks, None)
        if before is not None and before.names != names:
            self._incomplete.add(ranks)
        together = whole and part.all_counted  # from here on all count the same steps again
        complete = whole and ranks not in self._incomplete
        if complete and before is not None:
            counts["grad"] = before.counts + counts.get("grad", 0)
        if complete and together:
            part.write_counts()
        else:
            handed_over.uncounted |= part.names.keys()
        if together:
            self._incomplete.discard(ranks)
        elif complete and "grad" in counts:  # those of updates and parameters are of one step
            self._waiting[ranks] = _Waiting(names, counts["grad"])
            handed_over.waiting |= part.names.keys()

    def _tell(self, part: _Part, handed_over: HandedOver) -> None:
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


class _Waiting(NamedTuple):
    names: tuple[str, ...]
    counts: Counts  # [N, 4096] of gradients


class _Part:
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
        message |= {which: self._sketch(which) for which in _SKETCHES}
        for kind in self._taken:
            counts = self._own_counts(kind)
            bins = np.flatnonzero(counts)
            message |= {f"{kind}_bins": bins, f"{kind}_counts": counts.ravel()[bins]}
        return message

    def add(self, others: Iterable[Message]) -> bool:
        """Add the parts of all others to what was handed over; False: they are of other steps."""
        whole, found = self._statistics(), self._found()
        sketches = {which: self._sketch(which) for which in _SKETCHES}
        self.counts = {kind: self._own_counts(kind) for kind in self._taken}
        for other in others:
            if other["statistics"].shape != self._shape:
                return False
            whole = merged(whole, other["statistics"])
            found = _earliest(found, other["found"])
            sketches = {which: sketches[which] + other[which] for which in _SKETCHES}
            self._add_counts(other)
        whole = np.where(whole[:, :, None, STATISTICS.index("numel")] > 0, whole, 0.0)
        for block, mine, places, new in self._rows(self._buffer.statistics):
            self._arrays[block][..., mine] = np.where(new, whole[..., places], 0.0)
            if ("found", block) in self._arrays:
                self._arrays["found", block][mine] = np.where(new, found[places], -1)
        for which in _SKETCHES:
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
