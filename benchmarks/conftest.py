"""Ratios against what a user would otherwise run, measured in turn in one process.

`pytest benchmarks/` prints a table and writes `benchmarks/results/<processor>-<date>.json`, from
which `python benchmarks/table.py FILE` renders the README's table. The benchmarks marked gpu, which
`make gpu-check` runs, write `<gpu>-<date>.json`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the tests' baselines and shapes

import results
from comparison import Clock, Comparison, Traffic, measure, summarise
from gpu_timing import Gpu

_on_cpu: list[Comparison] = []
_on_gpu: list[Comparison] = []
_written: list[dict[str, Any]] = []  # the latest result of the GPU


def _milliseconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


@pytest.fixture
def compare(benchmark):
    """compare(case, ours, {"other": other}, rounds=9, target={"other": "10x faster"})

    before: called before each call, and not timed.
    clock: measures a call, in milliseconds; the time that it takes, unless another is given.
    """

    def run(
        case: str,
        ours: tuple[str, Callable[[], object]],
        others: dict[str, Callable[[], object]],
        *,
        rounds: int = 9,
        target: dict[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
        clock: Clock = _milliseconds,
    ) -> None:
        def set_up() -> None:  # what `before` returns would be taken for arguments
            before()

        name, function = ours
        times = measure(clock, {name: function, **others}, rounds, before)
        for comparison in summarise(case, name, times, target or {}):
            _on_cpu.append(comparison)
            benchmark.extra_info[comparison.other] = asdict(comparison)
        benchmark.pedantic(function, setup=set_up, rounds=3)

    return run


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def compare_gpu(gpu: Gpu):
    """compare_gpu(case, ours, others, moved=(bytes, "copy"), clock="device", target=...)

    moved: the bytes that have to be read and written, and the limit they are held against. clock:
    "device" (without the host's time), "both" (host and device together), "host". before: called
    before each call, and not timed.
    """

    def run(
        case: str,
        ours: tuple[str, Callable[[], object]],
        others: dict[str, Callable[[], object]],
        *,
        moved: tuple[int, str] | None = None,
        clock: str = "device",
        rounds: int = 21,
        target: dict[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        name, function = ours
        traffic = None
        if moved is not None:
            traffic = Traffic(*moved, gpu.limits[moved[1]])
        times = measure(gpu.clocks[clock], {name: function, **others}, gpu.rounds(rounds), before)
        _on_gpu.extend(summarise(case, name, times, target or {}, traffic))
        # After each case: a run that is stopped at its time limit leaves what it had.
        _written[:] = [results.result_of("make gpu-check", gpu.machine, _on_gpu)]
        results.write(_written[0])

    yield run
    gpu.free()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """cross_entropy first, in memory that the process has not used before.

    After the gigabytes of an optimizer's benchmark, new memory costs others next to nothing:
    benchmarks/README.md has both figures.
    """
    items.sort(key=lambda item: item.path.name != "test_cross_entropy.py")


def pytest_terminal_summary(terminalreporter) -> None:
    from table import render

    if _on_cpu:
        _written.append(results.result_of("pytest benchmarks/", results.cpu_machine(), _on_cpu))
    for result in _written:
        path = results.write(result)
        terminalreporter.section("ratios: other's time / ours, medians")
        terminalreporter.write_line(render(result))
        terminalreporter.write_line(f"written to {path}")
