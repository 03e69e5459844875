"""The run as lines of JSON: the sink that writes them and the function that reads them back."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyvizllm.telemetry.append_file import AppendFile
from pyvizllm.telemetry.records import Finding, Publication


class JsonlSink:
    """Appends one line of JSON for each publication with more in it than pictures.

    Schema; what follows the scalars is there only where there is any:

        {"step": int, "wall_time": seconds since 1970, "scalars": {tag: number},
         "texts": {tag: Markdown}, "arrays": {tag: [number]},
         "findings": [{"rule": string, "severity": "info" | "warning" | "serious", "step": int,
                       "message": string, "advice": string, "evidence": {name: number | string}}]}

    JSON has no NaN, so a number that is not finite is the string "NaN", "Infinity" or "-Infinity",
    which Python's `float()` reads back. Histograms and images are left out. A resumed run appends
    to the file: `read_history` tells what is valid. Raises OSError if `path` cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = AppendFile(self.path, self._begin)
        except OSError as error:
            reason = error.strerror
            raise OSError(f"JsonlSink: cannot write to {str(path)!r}: {reason}") from error

    @property
    def dropped(self) -> int:
        """How many publications were lost, because too many waited for the disk."""
        return self._file.dropped

    def write(self, publication: Publication) -> None:
        """Write a publication; after an OSError it waits for the next `write` or `flush`."""
        more: dict[str, object] = {}
        if publication.texts:
            more["texts"] = dict(publication.texts)
        if publication.arrays:
            arrays = publication.arrays.items()
            more["arrays"] = {tag: [_number(value) for value in row] for tag, row in arrays}
        if publication.findings:
            more["findings"] = [_finding(finding) for finding in publication.findings]
        if not (more or publication.scalars):
            return
        line = {
            "step": publication.step,
            "wall_time": publication.wall_time,
            "scalars": {tag: _number(value) for tag, value in publication.scalars.items()},
            **more,
        }
        self._file.append([json.dumps(line, allow_nan=False).encode() + b"\n"])

    def flush(self) -> None:
        """Return when everything written is on disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _begin(self) -> Iterator[bytes]:
        """End the line that a kill has torn, so that the next one is whole."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    yield b"\n"


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What a JsonlSink wrote: one entry a step, in order, with every key of its schema.

    A line torn by a kill is skipped. The lines of one step (of training, of an evaluation) become
    one entry, in which a later number or text of the same tag goes before an earlier one. Where a
    resumed run went back to an earlier step, the entries from there on are those of the resumed
    run alone.
    Raises OSError if the file cannot be read, ValueError if its
    lines are JSON of another kind.
    Example:
        losses = [entry["scalars"].get("train/loss") for entry in read_history(path)]
    """
    entries: list[dict[str, Any]] = []
    with Path(path).open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:  # torn
                continue
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                got = raw[:60].decode(errors="replace").strip()
                raise ValueError(f"read_history: expected lines with a step in {path}, got {got}")
            if entries and line["step"] < entries[-1]["step"]:
                entries = [entry for entry in entries if entry["step"] < line["step"]]
            if not entries or entries[-1]["step"] != line["step"]:
                entries.append(_empty(line["step"]))
            _merge(entries[-1], line)
    return entries


def _empty(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "wall_time": math.nan,
        "scalars": {},
        "texts": {},
        "arrays": {},
        "findings": [],
    }


def _merge(entry: dict[str, Any], line: dict[str, Any]) -> None:
    entry["wall_time"] = line.get("wall_time", entry["wall_time"])
    entry["texts"] |= line.get("texts", {})
    entry["findings"] += line.get("findings", [])
    entry["scalars"] |= {tag: float(value) for tag, value in line.get("scalars", {}).items()}
    arrays = line.get("arrays", {}).items()
    entry["arrays"] |= {tag: [float(value) for value in row] for tag, row in arrays}


def _finding(finding: Finding) -> dict[str, object]:
    evidence = finding.evidence.items()
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "step": finding.step,
        "message": finding.message,
        "advice": finding.advice,
        "evidence": {name: v if isinstance(v, str) else _number(v) for name, v in evidence},
    }


def _number(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)  # json takes no NumPy float32
