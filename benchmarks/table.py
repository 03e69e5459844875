"""Renders a results file as the README's table: python benchmarks/table.py FILE"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _milliseconds(value: float) -> str:
    if value < 0.1:
        return f"{value * 1e3:.1f} us"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2f} ms"


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def _machine(machine: dict[str, Any]) -> str:
    if "gpu" not in machine:
        return f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}"
    limits = [
        f"{name} of memory at {machine[f'{name}_gb_per_s']:.0f} GB/s"
        for name in ("copy", "read")
        if f"{name}_gb_per_s" in machine
    ]
    return ", ".join([machine["gpu"], f"driver {machine['driver']}", *limits])


def _bandwidth(comparison: dict[str, Any]) -> str:
    if comparison.get("gb_per_s") is None:
        return ""
    percent = f"{100 * comparison['fraction_of_limit']:.0f} % of {comparison['limit']}"
    return f"{comparison['gb_per_s']:.0f} GB/s, {percent}"


def _comparisons(comparisons: list[dict[str, Any]]) -> list[str]:
    columns = ["case", "ours", "instead of", "ratio (quartiles)", "asked"]
    on_gpu = any(c.get("gb_per_s") is not None for c in comparisons)
    if on_gpu:
        columns.insert(2, "bandwidth")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for c in comparisons:
        cells = [
            c["case"],
            f"{c['ours']}: {_milliseconds(c['ours_ms'])}",
            *([_bandwidth(c)] if on_gpu else []),
            f"{c['other']}: {_milliseconds(c['other_ms'])}",
            f"{_ratio(c['ratio'])} ({_ratio(c['ratio_low'])} to {_ratio(c['ratio_high'])})",
            c["target"],
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _stages(stages: list[dict[str, Any]]) -> list[str]:
    rows = ["| stage | result | seconds | its last line |", "|---|---|---|---|"]
    return rows + [
        f"| {s['stage']} | {s['result']} | {s['seconds']:.0f} | {s['note'].replace('|', '/')} |"
        for s in stages
    ]


def render(result: dict[str, Any]) -> str:
    machine = result["machine"]
    rows = [
        f"{_machine(machine)}; torch {machine['torch']}; {result['date']}; `{result['command']}`",
        "",
    ]
    if result["comparisons"]:
        rows += _comparisons(result["comparisons"])
    if "stages" in result:
        rows += ["", *_stages(result["stages"])]
    return "\n".join(rows)


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())))
