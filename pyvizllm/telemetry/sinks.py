"""What is published, what a sink is, and the two plain sinks: in memory and JSON lines."""

import json
import math
import os
from pathlib import Path
from typing import Protocol

from pyvizllm.telemetry.records import Publication


class Sink(Protocol):
    """Where publications go. Called by one thread only; may be slow, and may raise."""

    def write(self, publication: Publication) -> None:
        """Take one publication; it need not be on disk yet."""

    def flush(self) -> None:
        """Return when everything written is on disk."""

    def close(self) -> None:
        """Flush and release; nothing is written afterwards."""


class HistorySink:
    """Keeps the scalars of every publication in memory: `history[i] = {"step": ..., tag: value}`.

    Read `history` after `Publisher.flush()` or `close()`.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def write(self, publication: Publication) -> None:
        if publication.scalars:
            self.history.append({"step": publication.step, **publication.scalars})

    def flush(self) -> None:
        """Nothing to do: memory only."""

    def close(self) -> None:
        """Nothing to do: memory only."""


class JsonlSink:
    """Appends one line of JSON for each publication that has scalars or texts.

    Schema: `{"step": int, "wall_time": float, "scalars": {tag: number}, "texts": {tag: string}}`;
    `texts` only where there are any. JSON has no NaN, so a value that is not finite is the string
    "NaN", "Infinity" or "-Infinity", which Python's `float()` reads back. A resumed run appends to
    the file, so the last line of a step is the valid one.
    Raises OSError if `path` cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, one write a line: a forked child inherits nothing that it could write
            # a second time, and a killed process leaves at most its last line torn.
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            reason = error.strerror
            raise OSError(f"JsonlSink: cannot write to {str(self.path)!r}: {reason}") from error
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                write_all(self._file.fileno(), b"\n")

    def write(self, publication: Publication) -> None:
        if not (publication.scalars or publication.texts):
            return
        line: dict[str, object] = {
            "step": publication.step,
            "wall_time": publication.wall_time,
            "scalars": {tag: _json_number(value) for tag, value in publication.scalars.items()},
        }
        if publication.texts:
            line["texts"] = dict(publication.texts)
        write_all(self._file.fileno(), json.dumps(line, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()


def write_all(descriptor: int, data: bytes) -> None:
    """Write `data` to a file descriptor, in one system call unless the disk is nearly full."""
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, data[written:])


def _json_number(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)  # json takes no NumPy float32
