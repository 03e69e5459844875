"""From the numbers of sharded parameters' parts to those of the whole; publisher's thread only."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pyvizllm.telemetry.part_exchange import MissingPartError, PartExchange
from pyvizllm.telemetry.parts import Part, Ranks
from pyvizllm.telemetry.records import Counts

if TYPE_CHECKING:
    from pyvizllm.telemetry.publishing import Due
    from pyvizllm.telemetry.step_buffer import HandedOver

_logger = logging.getLogger("pyvizllm")


class Wholes:
    """Sends the parts that others show, and adds theirs to those that this process shows.

    Parts go together that are of the same steps. Where a process has handed over others, or
    nothing, the parameters that it has a part of are left out of these steps: an interval later
    all have the same again. A process whose publisher is late takes its counts of gradients a
    publication later than the others; they wait for it.

    Made on the thread that begins to watch: processes tell their watches of equal parameters apart
    by the order in which they begin.

    Arguments:
        names: of all watched parameters.
        awaited: since when somebody waits for this thread, which then waits less for others; or
            None.
    """

    _begun: ClassVar[Counter[tuple[str, ...]]] = Counter()

    def __init__(
        self, names: Sequence[str], awaited: Callable[[], float | None] = lambda: None
    ) -> None:
        self._begun[tuple(names)] += 1
        self._number = self._begun[tuple(names)]
        self._exchange = PartExchange(awaited)
        self._waiting: dict[Ranks, _Waiting] = {}  # counts that not all have taken yet
        self._incomplete: set[Ranks] = set()  # whose histograms lack others' parts
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
                part = Part(ranks, list(blocks), handed_over, due)
                whole = self._exchange_part(part)
                if part.leads:
                    self._show(part, whole, handed_over)

    def _exchange_part(self, part: Part) -> bool:
        """Send it, or add to it those of all others, where this process shows the whole."""
        if self._broken:
            return False
        exchange, name = self._exchange, f"pyvizllm/{part.digest:x}/{self._number}"
        try:
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

    def _show(self, part: Part, whole: bool, handed_over: HandedOver) -> None:
        if not whole:
            self._incomplete.add(part.ranks)
            handed_over.absent |= part.names.keys()
            self._tell(part, handed_over)
        if part.published:
            self._show_counts(part, whole, handed_over)

    def _show_counts(self, part: Part, whole: bool, handed_over: HandedOver) -> None:
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

    def _tell(self, part: Part, handed_over: HandedOver) -> None:
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
