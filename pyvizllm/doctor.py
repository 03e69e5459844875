"""What is wrong with a run, from its history: `pyvizllm doctor RUN`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pyvizllm.run_history import find_history
from pyvizllm.telemetry.diagnosis import RANKS, RESOLVED, Diagnosis
from pyvizllm.telemetry.jsonl import read_history
from pyvizllm.telemetry.overhead import EVERY_TAG
from pyvizllm.telemetry.records import Finding, Steps
from pyvizllm.telemetry.terminal import printable

Entry = Mapping[str, Any]  # of read_history
_MOST_ENTRIES = 1024  # so that it takes seconds


@dataclass(frozen=True)
class Complaint:
    """A finding, and when it had gone away again, if it has."""

    finding: Finding
    gone: int | None = None  # a step


@dataclass(frozen=True)
class Fault:
    """What a rule has said, once or again and again, at one severity."""

    first: Complaint
    last: Complaint
    count: int

    @property
    def steps(self) -> str:
        """When it was said, and when it had gone away."""
        text = f"step {self.first.finding.step}"
        if self.count > 1:
            times = "once" if self.count == 2 else f"{self.count - 1} times"
            text += f", {times} more until step {self.last.finding.step}"
        return text if self.last.gone is None else f"{text}, gone by step {self.last.gone}"


@dataclass(frozen=True)
class Examination:
    """What `examine` found in a run."""

    run: Path
    summary: Mapping[str, float]
    """"steps", "first_step" (of the first publication), and where they are known "seconds" (from
    that publication to the last), "first_loss", "loss", "eval_loss", "best_eval_loss",
    "best_eval_step", "tokens_per_second"."""
    complaints: list[Complaint]
    """In the order of their steps."""
    afterwards: bool
    """Whether the rules have only seen the published scalars: the run has no findings itself."""

    @property
    def serious(self) -> bool:
        """Whether there is or was a serious fault."""
        return any(complaint.finding.severity == "serious" for complaint in self.complaints)

    @property
    def faults(self) -> list[Fault]:
        """The complaints of each rule (and each evaluation's loss) as one, the worst first."""
        same: dict[tuple[object, ...], list[Complaint]] = {}
        for complaint in self.complaints:
            finding = complaint.finding
            key = finding.severity, finding.rule, finding.evidence.get("tag")
            same.setdefault(key, []).append(complaint)
        faults = [Fault(some[0], some[-1], len(some)) for some in same.values()]
        return sorted(faults, key=lambda fault: -RANKS[fault.first.finding.severity])

    def as_json(self) -> str:
        """One JSON object; a number that is not finite is a string, as in history.jsonl."""
        findings = [{**vars(c.finding), "gone": c.gone} for c in self.complaints]
        report = {
            "run": str(self.run),
            "serious": self.serious,
            "summary": dict(self.summary),
            "findings": findings,
            "afterwards": self.afterwards,
        }
        return json.dumps(_writable(report), indent=2, allow_nan=False)

    def as_text(self) -> str:
        """For people: a summary, then what was found, the worst first."""
        lines = [f"{self.run}: {_describe(self.summary)}"]
        for severity, faults in groupby(self.faults, lambda fault: fault.first.finding.severity):
            lines += ["", f"{severity}:"]
            for fault in faults:
                finding, last = fault.first.finding, fault.last.finding
                lines += [f"  {finding.rule} ({fault.steps})", f"    {finding.sentence}"]
                if fault.count > 1:
                    lines.append(f"    Step {last.step}: {last.sentence}")
                if last.advice:
                    lines.append(f"    {last.advice}")
        if not self.complaints:
            lines.append("Nothing is wrong, as far as the rules see.")
        if self.afterwards:
            lines += ["", "The run says nothing itself: this is from its published scalars alone."]
        return printable("\n".join(lines))


def examine(run: str | os.PathLike[str]) -> Examination:
    """Read a run's history and collect what was found.

    Where nobody has looked at the steps (an older run, or one of another tool that writes the same
    lines), those rules are applied for which scalars suffice, to one row a publication.

    Arguments:
        run: the run's folder, its history.jsonl, or a folder with exactly one run in it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has no line of a history, or there are several runs in the folder.

    Example:
        >>> examination = examine("runs/gpt")
        >>> print(examination.as_text())
    """
    file = find_history(run, "doctor")
    entries = read_history(file)
    if not entries:
        raise ValueError(f"doctor: expected lines of a run's history, got none in {file}")
    findings = [Finding(**finding) for entry in entries for finding in entry["findings"]]
    watched = any(EVERY_TAG in entry["scalars"] for entry in entries)  # every step was looked at
    afterwards = not findings and not watched
    if afterwards:
        findings = diagnose_scalars(entries)
    path = Path(run) if Path(run).is_file() else file.parent
    return Examination(
        path, _summary(entries), _complaints(findings), afterwards and bool(findings)
    )


def diagnose_scalars(entries: Sequence[Entry]) -> list[Finding]:
    """Apply the rules to the last 1024 publications instead of steps."""
    diagnosis, findings = Diagnosis(), list[Finding]()
    for entry in entries[-_MOST_ENTRIES:]:
        scalars, step = entry["scalars"], entry["step"]
        if any(tag.startswith("train/") for tag in scalars):
            values = {tag: np.array([value]) for tag, value in scalars.items()}
            logged = {tag: np.ones(1, np.bool_) for tag in values}
            wall_time = np.array([float(entry["wall_time"])])
            findings += diagnosis.add(Steps(step, (), {}, wall_time, values, logged))
        findings += diagnosis.add_evaluation(step, scalars)
    return findings


def _complaints(findings: Iterable[Finding]) -> list[Complaint]:
    """Findings with the step at which their rule took them back."""
    complaints: list[Complaint] = []
    for finding in findings:
        if RESOLVED not in finding.evidence:
            complaints.append(Complaint(finding))
            continue
        complaints = [
            Complaint(c.finding, finding.step)
            if c.finding.rule == finding.rule and c.gone is None
            else c
            for c in complaints
        ]
    return sorted(complaints, key=lambda complaint: complaint.finding.step)


def _summary(entries: Sequence[Entry]) -> dict[str, float]:
    summary = {"steps": float(entries[-1]["step"]), "first_step": float(entries[0]["step"])}
    seconds = float(entries[-1]["wall_time"]) - float(entries[0]["wall_time"])
    if len(entries) > 1 and math.isfinite(seconds):
        summary["seconds"] = seconds
    if losses := _series(entries, "train/loss"):
        summary |= {"first_loss": losses[0][1], "loss": losses[-1][1]}
    if evaluations := _series(entries, "eval/loss"):
        finite = [pair for pair in evaluations if math.isfinite(pair[1])] or evaluations
        step, best = min(finite, key=lambda pair: pair[1])
        summary |= {"eval_loss": evaluations[-1][1], "best_eval_loss": best}
        summary["best_eval_step"] = float(step)
    if rates := _series(entries, "train/tokens_per_second"):
        summary["tokens_per_second"] = median(rate for _, rate in rates)
    return summary


def _series(entries: Iterable[Entry], tag: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry["scalars"][tag]) for entry in entries if tag in entry["scalars"]]


def _describe(summary: Mapping[str, float]) -> str:
    parts = [f"{summary['steps']:.0f} steps"]
    if "seconds" in summary and summary["first_step"] == 0:
        parts[0] += f" in {format_seconds(summary['seconds'])} s"
    elif "seconds" in summary:  # how long the steps before took, nobody has written
        parts[0] = f"steps {summary['first_step']:.0f} to {summary['steps']:.0f} in "
        parts[0] += f"{format_seconds(summary['seconds'])} s"
    if "loss" in summary:
        parts.append(f"train loss {summary['loss']:.4g} (at first {summary['first_loss']:.4g})")
    if "eval_loss" in summary:
        best = f"{summary['best_eval_loss']:.4g} at step {summary['best_eval_step']:.0f}"
        parts.append(f"eval loss {summary['eval_loss']:.4g} (best {best})")
    if "tokens_per_second" in summary:
        parts.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Whole seconds; below ten two digits."""
    return f"{seconds:,.0f}" if abs(seconds) >= 10 else f"{seconds:.2g}"


def _writable(value: Any) -> Any:
    """The same without NaN and infinities, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: _writable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_writable(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
