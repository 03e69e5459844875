"""The last steps of everything, written to a file when something goes wrong."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import STATISTICS, Counts, Finding, Floats, Kind, Steps

FOLDER = "flight"
TRIGGERS = frozenset(("non_finite", "loss_spike", "divergence"))
"""Rules whose findings are worth a dump."""
FIRST, LAST = 4, 4  # dumps that are kept
_LONGEST_REASON = 64  # characters of a file's name, which may have 255: a message has no end
_FILE = re.compile(r"step-(\d+)-.*\.npz")

_logger = logging.getLogger("pyvizllm")


@dataclass(frozen=True)
class Flight:
    """What a dump holds: n steps, oldest first, of T parameters.

    Arrays are NaN where nothing was measured; `statistics[kind][:, i]` is row i of `STATISTICS`.
    """

    reason: str
    step: int  # at which it was written
    written: float  # seconds since 1970
    names: tuple[str, ...]  # [T]
    steps: Counts  # [n] their numbers
    wall_times: Floats  # [n] seconds since 1970
    losses: Floats  # [n]
    statistics: Mapping[Kind, Floats]  # [n, 12, T]
    scalars: Mapping[str, Floats]  # tag -> [n]
    metrics: Floats  # [n, 53] CrossEntropyMetrics.sums
    micro_batch_losses: list[list[float]]  # [n][micro-batches]
    sample_ids: list[Any]  # [n][micro-batches] what the loader said
    findings: list[Finding]

    def __repr__(self) -> str:
        """One line: the arrays are thousands of numbers."""
        many = "" if len(self.findings) == 1 else "s"
        return (
            f"<Flight: {self.reason!r} at step {self.step}, {len(self.steps)} steps of "
            f"{len(self.names)} parameters, {len(self.findings)} finding{many}>"
        )

    def statistic(self, kind: Kind, name: str) -> Floats:
        """[n, T]: one row of STATISTICS."""
        return self.statistics[kind][:, STATISTICS.index(name)]


class FlightRecorder:
    """Writes the history to `FOLDER/step-N-REASON.npz` in a run's folder.

    A file appears whole or not at all. The first four and the last four are kept, so that a run
    that goes wrong at every step does not fill the disk. A dump that fails is one warning, and
    never an exception for the caller.

    Arguments:
        history: what is written; call from the thread that appends to it.
        run_dir: the run's folder.

    Example:
        >>> recorder = FlightRecorder(diagnosis.history, run_dir)
        >>> path = recorder.dump("sigterm", step=1234)
        >>> load_flight(path).statistic("grad", "norm")  # [n, T]
    """

    def __init__(self, history: History, run_dir: str | os.PathLike[str]) -> None:
        self.history = history
        self.folder = Path(run_dir) / FOLDER
        self._warned = False

    def react(self, findings: Iterable[Finding]) -> Path | None:
        """Dump if a finding is of the kind that needs it; None if none is, or it failed."""
        findings = list(findings)
        grave = [finding for finding in findings if finding.rule in TRIGGERS]
        return self.dump(grave[0].rule, grave[0].step, findings) if grave else None

    def dump(self, reason: str, step: int, findings: Sequence[Finding] = ()) -> Path | None:
        """Write the history, and what was found; None if there is nothing or it failed."""
        if len(self.history) == 0:
            return None
        name = f"step-{step}-{_slug(reason) or 'asked'}"
        try:
            arrays = _arrays(self.history, reason, step, findings)
            path = self._write(f"{name}.npz", arrays)
            self._forget()
        except Exception as error:
            if not self._warned:
                _logger.warning("flight recorder: cannot write %s: %s", self.folder / name, error)
            self._warned = True
            return None
        return path

    def _write(self, name: str, arrays: Mapping[str, np.ndarray]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.{os.getpid()}.part"
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            return partial.replace(self.folder / name)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _forget(self) -> None:
        """Delete the dumps between the first and the last few."""
        names = [(path, _FILE.fullmatch(path.name)) for path in self.folder.iterdir()]
        found = [(int(match[1]), path) for path, match in names if match]
        for _, path in sorted(found)[FIRST:-LAST]:
            path.unlink(missing_ok=True)


def _slug(reason: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_")[:_LONGEST_REASON].rstrip("_")


def flight_text(path: Path, reason: str, step: int, findings: Sequence[Finding] = ()) -> str:
    """What TensorBoard shows of a dump, in Markdown."""
    where = f"the last steps are in `{FOLDER}/{path.name}`; pyvizllm.telemetry.load_flight reads it"
    lines = [f"**{reason}** at step {step}: {where}.", ""]
    lines += [f"- *{f.severity}*, step {f.step}: {f.text}" for f in findings]
    return "\n".join(lines)


def load_flight(path: str | os.PathLike[str]) -> Flight:
    """Read a dump of the flight recorder.

    Arguments:
        path: a file `flight/step-N-REASON.npz`.

    Returns:
        Flight: all arrays, in memory.

    Raises:
        OSError: it cannot be read. ValueError: it is no dump.

    Example:
        >>> flight = load_flight("runs/gpt/flight/step-1234-non_finite.npz")
        >>> flight.steps[-1], flight.statistic("grad", "norm")[-1].max()
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        with np.load(data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        return Flight(
            statistics=_below("statistics/", arrays),  # type: ignore[arg-type]
            scalars=_below("scalars/", arrays),
            names=tuple(about.pop("names")),
            findings=[Finding(**finding) for finding in about.pop("findings")],
            **{name: array for name, array in arrays.items() if "/" not in name},
            **about,
        )
    except Exception as error:  # zipfile, zlib, NumPy and JSON each have their own
        raise ValueError(
            f"load_flight: expected a dump of the flight recorder, got {os.fspath(path)!r}"
        ) from error


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}


def _arrays(
    history: History, reason: str, step: int, findings: Sequence[Finding]
) -> dict[str, np.ndarray]:
    """Everything of a dump by name; what is no array is JSON in "about"."""
    kinds = {kind for steps in history.chunks for kind in steps.statistics}
    tags = {tag for steps in history.chunks for tag in steps.scalars}
    losses, samples = _micro_batches(history.chunks, len(history))
    about = {
        "reason": reason,
        "step": step,
        "written": time.time(),
        "names": history.names,
        "micro_batch_losses": losses,
        "sample_ids": samples,
        "findings": [asdict(finding) for finding in findings],
    }
    return {
        "about": np.array(json.dumps(about, default=_plain)),
        "steps": history.numbers(),
        "wall_times": history.wall_times(),
        "losses": history.loss(),
        "metrics": history.metrics(),
        **{f"statistics/{kind}": history.table(kind) for kind in kinds},
        **{f"scalars/{tag}": history.scalar(tag) for tag in tags},
    }


def _micro_batches(chunks: Sequence[Steps], rows: int) -> tuple[list[Any], list[Any]]:
    """The losses and the sample ids of the last `rows` steps, by micro-batch."""
    losses: list[Any] = []
    samples: list[Any] = []
    for steps in chunks:
        batches = steps.micro_batches
        if batches is None:
            losses += [[]] * len(steps)
            samples += [[]] * len(steps)
            continue
        for row in range(len(steps)):
            losses.append(batches.losses[row][batches.seen[row]].tolist())
            samples.append(list(batches.sample_ids[row]) if batches.sample_ids else [])
    return losses[len(losses) - rows :], samples[len(samples) - rows :]


def _plain(value: object) -> object:
    """What JSON cannot write: arrays and tensors as lists, anything else by its name."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
