"""Runs the stages of a long check: each a command with a log file, a time limit and an outcome."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

LEAST = 5.0
"""Seconds that have to be left for a stage to be started at all."""


@dataclass(frozen=True)
class Stage:
    name: str
    command: Sequence[str]
    limit: float  # seconds
    environ: Mapping[str, str] = field(default_factory=dict)  # on top of our own
    expected: str = ""  # in the last line of its output


@dataclass(frozen=True)
class Outcome:
    stage: str
    result: str  # "passed", or what went wrong
    seconds: float
    note: str  # the last line of the log

    @property
    def passed(self) -> bool:
        return self.result == "passed"


def run_stages(
    groups: Iterable[Sequence[Stage]], folder: Path, cwd: Path, total: float
) -> list[Outcome]:
    """Run one group after the other, the stages of a group at the same time.

    A stage that fails stops no other. All of them together take at most `total` seconds: what a
    slow stage used up is missing from the limits of the later ones.
    """
    deadline = time.monotonic() + total
    outcomes: list[Outcome] = []
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            outcomes += pool.map(lambda stage: run_stage(stage, folder, cwd, deadline), group)
    return outcomes


def run_stage(stage: Stage, folder: Path, cwd: Path, deadline: float) -> Outcome:
    """Run one stage, its output in folder/NAME.log; `deadline` is of time.monotonic."""
    begin = time.monotonic()
    limit = min(stage.limit, deadline - begin)
    if limit < LEAST:
        return Outcome(stage.name, "not run: no time was left", 0.0, "")
    log = folder / f"{stage.name}.log"
    _say(f"{stage.name} (at most {limit:.0f} s) ...")
    with log.open("wb") as output:
        result = _run(stage, output.fileno(), cwd, limit)
    note = last_line(log)
    if result == "passed" and stage.expected not in note:
        result = f"failed: expected {stage.expected!r} in the last line"
    outcome = Outcome(stage.name, result, time.monotonic() - begin, note)
    _say(f"{stage.name} {result}, {outcome.seconds:.0f} s: {outcome.note}")
    return outcome


def _say(what: str) -> None:
    print(f"gpu-check: {what}\n", end="", flush=True)  # one write: threads do not mix their lines


def _run(stage: Stage, output: int, cwd: Path, limit: float) -> str:
    try:
        process = subprocess.Popen(
            stage.command,
            cwd=cwd,
            env={**os.environ, **stage.environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to end its children with it
        )
    except OSError as error:
        return f"failed: {stage.command[0]}: {error.strerror}"
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        # Also after a regular end: what a stage left behind would disturb the next one's timing.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "passed" if code == 0 else f"failed: exit code {code}"


def last_line(log: Path) -> str:
    """The last line with something on it, without pytest's rules around it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip("= \t")]
    return lines[-1].strip("= \t") if lines else ""
