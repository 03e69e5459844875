"""What a sink is, and the one in memory."""

from typing import Protocol, runtime_checkable

from pyvizllm.telemetry.records import Finding, Publication


@runtime_checkable
class Sink(Protocol):
    """Where publications go. Called by one thread only; may be slow, and may raise.

    An OSError means "the disk refuses for now": the sink keeps what it was given until a later
    `write` or `flush` succeeds, in bounded memory, and counts what it has to give up in `dropped`,
    where it has that attribute. Any other exception means that it is of no use any more.
    """

    def write(self, publication: Publication) -> None:
        """Take one publication; it need not be on disk yet."""

    def flush(self) -> None:
        """Return when everything written is on disk."""

    def close(self) -> None:
        """Flush and release; nothing is written afterwards."""


class HistorySink:
    """Keeps every publication's scalars, and what was found, in memory.

    `history[i] = {"step": ..., tag: value}`; `findings` in their order. Read them after
    `Publisher.flush()` or `close()`.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.findings: list[Finding] = []

    def write(self, publication: Publication) -> None:
        if publication.scalars:
            self.history.append({"step": publication.step, **publication.scalars})
        self.findings += publication.findings

    def flush(self) -> None:
        """Nothing to do: memory only."""

    def close(self) -> None:
        """Nothing to do: memory only."""
