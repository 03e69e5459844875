"""The page: a run's findings, curves, layers and settings, from the files in its folder."""

from __future__ import annotations

import contextlib
import datetime
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyvizllm.doctor import Examination, Fault, examine, format_seconds
from pyvizllm.ops import SKETCH_SIZE
from pyvizllm.report.charts import Series, line_chart
from pyvizllm.report.heat_map import heat_map
from pyvizllm.report.path import path_figure
from pyvizllm.report.style import STYLE
from pyvizllm.run_history import find_history
from pyvizllm.telemetry.heatmap import COLUMNS
from pyvizllm.telemetry.jsonl import read_history
from pyvizllm.telemetry.trajectory import POINT_TAG, START_TAG

_Entries = Sequence[Mapping[str, Any]]
_FARTHEST = 1e100  # of a point of the path, whose square is to be a number


class _Chart(NamedTuple):
    title: str
    tags: tuple[str, ...]
    log: bool = False
    limits: tuple[float, float] | None = None  # of what the values can be


_CHARTS = (
    _Chart("Loss", ("train/loss", "eval/loss")),
    _Chart("Accuracy", ("train/accuracy", "eval/accuracy"), limits=(0, 1)),
    _Chart("Gradient norm", ("train/grad_norm", "train/grad_norm_max"), log=True),
    _Chart("Learning rate", ("train/learning_rate",)),
    _Chart("Tokens per second", ("train/tokens_per_second",)),
    _Chart("Steps per second", ("train/steps_per_second",)),
    _Chart("Entropy of the predictions, nats", ("train/entropy", "eval/entropy")),
    _Chart("Gradient noise scale", ("noise/scale",), log=True),
    _Chart("Share of steps clipped", ("train/clipped",), limits=(0, 1)),
    _Chart("NaN and Inf in gradients", ("health/nans", "health/infs")),
    _Chart("Telemetry overhead, %", ("pyvizllm/overhead_pct",)),
)
_LAYERS = (
    ("Gradient norm by layer", "layer_grad_norm/"),
    ("Update-to-weight ratio by layer", "layer_update_ratio/"),
)
_PATH = (
    _Chart(
        "Distance from the start, path length", ("trajectory/distance", "trajectory/path_length")
    ),
    _Chart("Cosine of successive updates", ("trajectory/update_cosine",), limits=(-1, 1)),
)
_PATH_LAYERS = (("Relative change by layer", "moved/"),)
_SUMMARY = (
    ("steps", "steps", "{:,.0f}"),
    ("loss", "last loss", "{:.4g}"),
    ("eval_loss", "last eval loss", "{:.4g}"),
    ("best_eval_loss", "best eval loss", "{:.4g}"),
    ("tokens_per_second", "tokens per second, median", "{:,.0f}"),
)


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run; returns where.

    Arguments:
        run: the run's folder, its history.jsonl, or a folder with exactly one run in it.
        output: the file; None for report.html in the run's folder.

    Raises:
        FileNotFoundError: there is no such folder, or no history in it.
        ValueError: nothing has been published yet, or there are several runs in the folder.
        OSError: the page cannot be written.
    """
    history = find_history(run, "report")
    page = render(history)
    path = history.with_name("report.html") if output is None else Path(output)
    path.write_text(page, encoding="utf-8", errors="replace")  # names that are no UTF-8
    return path


def render(run: str | os.PathLike[str]) -> str:
    """The page as HTML: one file that asks for nothing else, on paper or phone, dark or light.

    Raises:
        FileNotFoundError: there is no such folder, or no history in it.
        ValueError: nothing has been published yet, or there are several runs in the folder.
    """
    history = find_history(run, "report")
    folder, entries = history.parent, read_history(history)
    if not entries:
        raise ValueError(f"report: expected a history with publications, got none in {folder}")
    examination = examine(history)
    curves, steps = _curves(entries), _step_range(entries)
    name = html.escape(folder.resolve().name)
    body = "".join(
        (
            f"<header><h1>{name}</h1>{_when(entries)}{_summary(examination)}</header>",
            _findings(examination.faults),
            _section("Curves", _charts(_CHARTS, curves, steps)),
            _section("Layers", _families(_LAYERS, curves, steps), _heat_map(curves)),
            _section(
                "Path",
                _charts(_PATH, curves, steps)
                + _families(_PATH_LAYERS, curves, steps)
                + _path(entries),
            ),
            _settings(folder, entries),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>"
    )


def _curves(entries: _Entries) -> dict[str, Series]:
    points: dict[str, tuple[list[float], list[float]]] = {}
    for entry in entries:
        for tag, value in entry["scalars"].items():
            steps, values = points.setdefault(tag, ([], []))
            steps.append(entry["step"])
            values.append(value)
    return {
        tag: Series(np.array(s, float), np.array(v, float), of_moments=tag.startswith("eval/"))
        for tag, (s, v) in points.items()
    }


def _step_range(entries: _Entries) -> tuple[float, float]:
    """The steps of the run, for every chart: a curve that ends early is seen to."""
    steps = [float(entry["step"]) for entry in entries]
    begin = steps[0]
    if entries[0]["scalars"] and begin > 0:  # which are those of the steps before, too
        begin = max(0.0, begin - (steps[1] - begin)) if len(steps) > 1 else 0.0
    return begin, steps[-1]


def _charts(
    kinds: Sequence[_Chart], curves: Mapping[str, Series], steps: tuple[float, float]
) -> str:
    charts = []
    for title, tags, log, limits in kinds:
        some = {tag: curves[tag] for tag in tags if tag in curves}
        if title.startswith("NaN") and not any(curve.values.any() for curve in some.values()):
            continue  # nothing but zeros is no news
        charts.append(line_chart(title, some, log=log, steps=steps, limits=limits))
    return "".join(charts)


def _families(
    kinds: Sequence[tuple[str, str]], curves: Mapping[str, Series], steps: tuple[float, float]
) -> str:
    return "".join(
        line_chart(title, _family(curves, prefix), log=True, steps=steps) for title, prefix in kinds
    )


def _family(curves: Mapping[str, Series], prefix: str) -> dict[str, Series]:
    return {tag.removeprefix(prefix): c for tag, c in curves.items() if tag.startswith(prefix)}


def _heat_map(curves: Mapping[str, Series]) -> str:
    """Layers by publications: the mean norm of each interval."""
    layers = _family(curves, "layer_grad_norm/")
    if not layers:
        return ""
    steps = np.unique(np.concatenate([curve.steps for curve in layers.values()]))
    norms = np.full((len(steps), len(layers)), -1.0)
    for column, curve in enumerate(layers.values()):
        norms[np.searchsorted(steps, curve.steps), column] = curve.values
    norms[np.isinf(norms)] = np.nan
    if len(steps) > COLUMNS:
        starts = np.linspace(0, len(steps), COLUMNS, endpoint=False).astype(int)
        norms = np.maximum.reduceat(norms, starts, axis=0)
    return heat_map(norms, tuple(layers), (f"{steps[0]:,.0f}", f"{steps[-1]:,.0f}"))


def _path(entries: _Entries) -> str:
    points = [(e["step"], e["arrays"][POINT_TAG]) for e in entries if POINT_TAG in e["arrays"]]
    starts = [e["arrays"].get(START_TAG, ()) for e in entries]
    known = [s for s in starts if len(s) == 1 + SKETCH_SIZE and math.isfinite(s[0])]
    points = [(int(s[0]), s[1:]) for s in known[:1]] + points  # others go on from the first
    points = [(s, p) for s, p in points if len(p) == SKETCH_SIZE and np.abs(p).max() < _FARTHEST]
    if len(points) < 3:
        return ""
    chosen = np.unique(np.linspace(0, len(points) - 1, 1024).astype(int)).tolist()
    steps, path = zip(*(points[i] for i in chosen), strict=True)
    return path_figure(np.array(path, dtype=np.float64), steps)


def _findings(faults: Sequence[Fault]) -> str:
    if not faults:
        return "<section><h2>Findings</h2><p>Nothing was found to be wrong.</p></section>"
    items = []
    for fault in faults:
        finding, last = fault.first.finding, fault.last.finding
        again = f"<p>Step {last.step}: {html.escape(last.sentence)}</p>" if fault.count > 1 else ""
        advice = f"<p>{html.escape(last.advice)}</p>" if last.advice else ""
        items.append(
            f'<li class="{finding.severity}"><strong>{html.escape(finding.sentence)}</strong>'
            f"{again}{advice}<small><b>{finding.severity}</b>, {html.escape(finding.rule)}, "
            f"{fault.steps}</small></li>"
        )
    return f"<section><h2>Findings</h2><ul class='findings'>{''.join(items)}</ul></section>"


def _when(entries: _Entries) -> str:
    times = [e["wall_time"] for e in entries if math.isfinite(e["wall_time"])]
    if not times:
        return ""
    try:
        begin = datetime.datetime.fromtimestamp(times[0]).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):  # no year that a calendar has
        return ""
    return f"<p class='when'>{begin}, first publication</p>"


def _summary(examination: Examination) -> str:
    items = "".join(
        f"<div><dt>{title}</dt><dd>{form.format(examination.summary[key])}</dd></div>"
        for key, title, form in _SUMMARY
        if key in examination.summary
    )
    if "seconds" in examination.summary:
        first = examination.summary["first_step"]
        title = "seconds" if first == 0 else f"seconds, from step {first:,.0f} on"
        seconds = format_seconds(examination.summary["seconds"])
        items += f"<div><dt>{title}</dt><dd>{seconds}</dd></div>"
    return f"<dl>{items}</dl>"


def _section(title: str, charts: str, wide: str = "") -> str:
    if not charts and not wide:
        return ""
    return (
        f"<section><h2>{title} <span>over optimizer steps</span></h2>"
        f"<div class='charts'>{charts}</div>{wide}</section>"
    )


def _settings(folder: Path, entries: _Entries) -> str:
    """The configuration that train wrote, or that watch was given as a text."""
    text = ""
    if (folder / "config.json").is_file():
        text = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    for entry in entries:
        text = text or entry["texts"].get("config", "")
    if not text:
        return ""
    with contextlib.suppress(ValueError, RecursionError):  # what is no JSON is shown as it is
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return (
        "<section><details><summary>Settings</summary>"
        f"<pre>{html.escape(text)}</pre></details></section>"
    )
