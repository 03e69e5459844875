"""The run as lines of JSON: the sink that writes them and the function that reads them back."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pyvizllm.telemetry.append_file import AppendFile
from pyvizllm.telemetry.records import Finding, Publication, Severity

HISTORY = "history.jsonl"  # in the folder of a run
_LAST_STEP = 2**53  # steps are drawn as float64


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

    def discard(self) -> None:
        """Close, and delete the file if this has made it."""
        self._file.discard()

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

    Arguments:
        path: the run's folder, or the file `history.jsonl` in it.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is JSON of another kind.

    Example:
        losses = [entry["scalars"].get("train/loss") for entry in read_history(path)]
    """
    entries: list[dict[str, Any]] = []
    path = Path(path)
    if path.is_dir():
        path /= HISTORY
    with path.open("rb") as file:
        for raw in file:
            try:
                line = _entry(json.loads(raw))
            except json.JSONDecodeError:  # torn
                continue
            except UnicodeDecodeError:
                continue
            except (
                TypeError,
                ValueError,
                AttributeError,
                ArithmeticError,
                RecursionError,
            ) as error:
                got = raw[:60].decode(errors="replace").strip()
                raise ValueError(
                    f"read_history: expected lines of a run's history in {path}, got {got}"
                ) from error
            if entries and line["step"] < entries[-1]["step"]:
                entries = [entry for entry in entries if entry["step"] < line["step"]]
            if entries and entries[-1]["step"] == line["step"]:
                _merge(entries[-1], line)
            else:
                entries.append(line)
    return entries


def _entry(line: Any) -> dict[str, Any]:
    """A line with every key of the schema; whatever does not fit raises."""
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or abs(step) > _LAST_STEP:
        raise ValueError("no step")
    return {
        "step": step,
        "wall_time": float(line.get("wall_time", math.nan)),
        "scalars": {_text(tag): float(v) for tag, v in line.get("scalars", {}).items()},
        "texts": {_text(tag): _text(text) for tag, text in line.get("texts", {}).items()},
        "arrays": {
            _text(tag): [float(value) for value in row]
            for tag, row in line.get("arrays", {}).items()
        },
        "findings": [_read_finding(finding) for finding in line.get("findings", [])],
    }


def _read_finding(finding: Any) -> dict[str, Any]:
    severity = finding.get("severity", "info")
    evidence = finding.get("evidence", {}).items()
    return {
        "rule": _text(finding.get("rule", "?")),
        "severity": severity if severity in get_args(Severity) else "info",
        "step": int(finding.get("step", 0)),
        "message": _text(finding.get("message", "")),
        "advice": _text(finding.get("advice", "")),
        "evidence": {_text(k): _text(v) if isinstance(v, str) else float(v) for k, v in evidence},
    }


def _text(value: Any) -> str:
    """A string that can be printed: JSON has halves of characters."""
    if not isinstance(value, str):
        raise TypeError("no text")
    return value.encode(errors="replace").decode()


def _merge(entry: dict[str, Any], line: dict[str, Any]) -> None:
    if not math.isnan(line["wall_time"]):
        entry["wall_time"] = line["wall_time"]
    for key in ("scalars", "texts", "arrays"):
        entry[key] |= line[key]
    entry["findings"] += line["findings"]


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
    if math.isfinite(value):
        return float(value)  # json takes no NumPy float32
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
