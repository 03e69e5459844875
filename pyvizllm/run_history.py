"""Which run is meant: the history that `pyvizllm doctor` and `pyvizllm report` read."""

from __future__ import annotations

import os
from pathlib import Path

from pyvizllm.telemetry.jsonl import HISTORY

_MOST_LISTED = 10


def find_history(run: str | os.PathLike[str], command: str) -> Path:
    """The history.jsonl of a run.

    Arguments:
        run: the run's folder, its history.jsonl, or a folder with exactly one run in it.
        command: "doctor" or "report", for the sentence of an error.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several runs in the folder; the sentence lists them.
    """
    path = Path(run)
    if path.is_file():
        return path
    if (path / HISTORY).is_file():
        return path / HISTORY
    runs = [file for file in path.glob(f"*/{HISTORY}") if file.is_file()]
    if not runs:
        raise FileNotFoundError(
            f"{command}: expected the folder of a run with {HISTORY}, got {path}"
        )
    if len(runs) > 1:
        newest = sorted(runs, key=lambda file: file.stat().st_mtime, reverse=True)
        names = ", ".join(str(file.parent) for file in newest[:_MOST_LISTED])
        more = f" and {len(runs) - _MOST_LISTED} older ones" if len(runs) > _MOST_LISTED else ""
        raise ValueError(
            f"{command}: expected the folder of one run, got {path} with {len(runs)}, "
            f"the newest first: {names}{more}"
        )
    return runs[0]
