"""Ratios against what a user would otherwise run, measured in turn in one process.

`pytest benchmarks/` prints a table and writes `benchmarks/results/<processor>-<date>.json`, from
which `python benchmarks/table.py FILE` renders the README's table.
"""

from __future__ import annotations

import datetime
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from pyvizllm import info

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the tests' baselines and shapes

RESULTS = Path(__file__).parent / "results"


@dataclass
class Comparison:
    """Ours against one other way, medians over rounds in which both ran, one after the other."""

    case: str
    ours: str
    other: str
    ours_ms: float
    other_ms: float
    ratio: float  # the median over rounds of other's time / ours
    ratio_low: float  # quartiles over rounds
    ratio_high: float
    rounds: int
    target: str  # what the project asks of itself, or ""


_comparisons: list[Comparison] = []


def _milliseconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


@pytest.fixture
def compare(benchmark):
    """compare(case, ours, {"other": other}, rounds=9, target={"other": "10x faster"})"""

    def run(
        case: str,
        ours: tuple[str, Callable[[], object]],
        others: dict[str, Callable[[], object]],
        *,
        rounds: int = 9,
        target: dict[str, str] | None = None,
    ) -> None:
        name, function = ours
        functions = {name: function, **others}
        for warm_up in functions.values():
            warm_up()
            warm_up()
        times: dict[str, list[float]] = {key: [] for key in functions}
        gc.collect()
        for _ in range(rounds):  # in turn, so that a drift of the machine meets all of them
            for key, timed in functions.items():
                times[key].append(_milliseconds(timed))
        for key in others:
            ratios = [b / a for a, b in zip(times[name], times[key], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            comparison = Comparison(
                case=case,
                ours=name,
                other=key,
                ours_ms=statistics.median(times[name]),
                other_ms=statistics.median(times[key]),
                ratio=statistics.median(ratios),
                ratio_low=low,
                ratio_high=high,
                rounds=rounds,
                target=(target or {}).get(key, ""),
            )
            _comparisons.append(comparison)
            benchmark.extra_info[key] = asdict(comparison)
        benchmark.pedantic(function, rounds=3)

    return run


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def pytest_terminal_summary(terminalreporter) -> None:
    if not _comparisons:
        return
    from table import render

    machine = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.ops.pyvizllm.cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyvizllm": info.version(),
    }
    today = datetime.date.today().isoformat()
    result = {
        "command": "pytest benchmarks/",
        "date": today,
        "machine": machine,
        "comparisons": [asdict(comparison) for comparison in _comparisons],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", machine["processor"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug}-{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    terminalreporter.section("ratios: other's time / ours, medians")
    terminalreporter.write_line(render(result))
    terminalreporter.write_line(f"written to {path}")
