"""The benchmarks take minutes and run by hand, those of a GPU only on one.

What can be shown of them here: they can be collected, they run, and their arithmetic is right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_timing
import pytest
import results
import torch
from comparison import Traffic, measure, summarise
from table import render

ROOT = Path(__file__).parent.parent


def run_pytest(*arguments: str, **environ: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environ}
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_every_benchmark_can_be_collected() -> None:
    output = run_pytest("benchmarks", "--collect-only")
    for name in ("cross_entropy", "tensor_stats", "training", "gpu_cross_entropy"):
        assert f"benchmarks/test_{name}.py::" in output


def test_gpu_benchmarks_run_on_tiny_inputs_here(tmp_path: Path) -> None:
    """All but the clocks: the same code, the same results file, on the CPU."""
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/test_gpu_*.py"))
    output = run_pytest(
        *("-m", "gpu", *files, "-k", "small_rows or wandb or many_small or 16384 or clipping"),
        PYVIZLLM_GPU_DEVICE="cpu",
        GPU_CHECK_OUT=str(tmp_path),
    )
    (path,) = tmp_path.glob("no-gpu-*.json")
    result = json.loads(path.read_text())
    assert result["command"] == "make gpu-check"
    assert {"copy_gb_per_s", "read_gb_per_s", "torch", "pyvizllm"} <= set(result["machine"])
    ours = {c["ours"] for c in result["comparisons"]}
    cross_entropies = {"fused, inplace", "fused", "fused forward", "recompute"}
    assert {*cross_entropies, "tensor_stats", "AdamW", "clip_grad_norm_"} == ours
    others = {c["other"] for c in result["comparisons"]}
    assert {
        "F.cross_entropy",
        "torch.compile",
        "wandb.watch's way",
        "torch's clip_grad_norm_",
    } <= others
    for comparison in result["comparisons"]:
        if comparison["limit"]:
            limit = result["machine"][f"{comparison['limit']}_gb_per_s"]
            assert comparison["fraction_of_limit"] == comparison["gb_per_s"] / limit
    assert render(result) in output


def test_gpu_tests_run_here_but_for_what_is_cudas_own() -> None:
    output = run_pytest(
        *("-m", "gpu", "tests", "-k", "constant_rows or nothing_to_do or 1024 or bit_value"),
        PYVIZLLM_GPU_DEVICE="cpu",
    )
    assert " passed" in output
    assert "skipped" not in output


def test_pytest_m_gpu_collects_without_tensorboardx() -> None:
    script = """
import sys, pytest
for name in ("tensorboardX", "tensorboard", "tyro", "crc32c"):
    sys.modules[name] = None
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q"]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/test_gpu_tensor_stats.py::" in done.stdout


# --- The arithmetic, from given times


def test_medians_ratios_and_bandwidth_of_given_times() -> None:
    """2 GB in a median of 1 ms: 2000 GB/s, of 2500 that a copy moves."""
    times = {"ours": [1.0, 2.0, 0.5, 1.0, 1.0], "theirs": [3.0, 3.0, 3.0, 4.0, 2.0]}
    traffic = Traffic(2 * 10**9, "copy", 2500.0)
    (c,) = summarise("a case", "ours", times, {"theirs": "2x"}, traffic)
    assert (c.case, c.ours, c.other, c.rounds, c.target) == ("a case", "ours", "theirs", 5, "2x")
    assert (c.ours_ms, c.other_ms) == (1.0, 3.0)
    assert c.ratio == 3.0  # of 3, 1.5, 6, 4, 2: pairs of one round, not of medians
    assert (c.ratio_low, c.ratio_high) == (1.75, 5.0)
    assert (c.gb_per_s, c.limit, c.fraction_of_limit) == (2000.0, "copy", 0.8)


def test_without_traffic_there_is_no_bandwidth() -> None:
    (c,) = summarise("a case", "ours", {"ours": [1.0, 1.0], "theirs": [2.0, 2.0]}, {})
    assert (c.gb_per_s, c.limit, c.fraction_of_limit, c.target) == (None, "", None, "")


def test_ways_are_measured_in_turn() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure(lambda function: (function(), len(calls))[1], functions, rounds=3)
    assert calls == [*"aabb", *"ababab"]
    assert times == {"a": [5, 7, 9], "b": [6, 8, 10]}


def test_three_caches_lie_between_two_uses_of_a_buffer() -> None:
    for mb in (10, 50, 65, 149, 150, 151, 4000):
        count = gpu_timing.sweeps(mb * 10**6, cache_bytes=50 * 10**6)
        assert count >= 2
        assert (count - 1) * mb >= 150
    calls: list[int] = []
    function = gpu_timing.in_turn([lambda i=i: calls.append(i) for i in range(3)])
    for _ in range(7):
        function()
    assert calls == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(("late", "sleeps"), [(0, 1), (1, 2), (2, 3), (9, 4)])
def test_the_host_gets_a_head_start_until_it_is_in_time(late, sleeps, monkeypatch) -> None:
    """`late`: how many times the device has begun before the host was done queueing."""
    slept: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return len(slept) <= late

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return float(len(slept))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    assert gpu_timing.device_clock(lambda: None) == sleeps
    assert slept == [gpu_timing.HEAD_START * 2**i for i in range(sleeps)]


# --- The table

GPU = {"gpu": "Some GPU", "driver": "1.2", "torch": "9.9", "pyvizllm": "0"}
STAGES = [
    {"stage": "build", "result": "passed", "seconds": 41.4, "note": "done"},
    {"stage": "tests", "result": "failed: exit code 1", "seconds": 60, "note": "1 failed | 2"},
]


def test_table_of_a_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    times = {"ours": [0.05] * 4, "theirs": [0.2] * 4}
    with_limit = summarise("big", "ours", times, {"theirs": "2x"}, Traffic(10**8, "read", 2500))
    without = summarise("small", "ours", times, {})
    machine = {**GPU, "copy_gb_per_s": 2400.0, "read_gb_per_s": 2500.0}
    result = results.result_of("make gpu-check", machine, with_limit + without)
    path = results.write({**result, "stages": STAGES})
    assert path == tmp_path / f"some-gpu-{result['date']}.json"
    assert render(json.loads(path.read_text())).splitlines() == [
        "Some GPU, driver 1.2, copy of memory at 2400 GB/s, read of memory at 2500 GB/s; "
        f"torch 9.9; {result['date']}; `make gpu-check`",
        "",
        "| case | ours | bandwidth | instead of | ratio (quartiles) | asked |",
        "|---|---|---|---|---|---|",
        "| big | ours: 50.0 us | 2000 GB/s, 80 % of read | theirs: 0.20 ms | 4.0x (4.0x to 4.0x) "
        "| 2x |",
        "| small | ours: 50.0 us |  | theirs: 0.20 ms | 4.0x (4.0x to 4.0x) |  |",
        "",
        "| stage | result | seconds | its last line |",
        "|---|---|---|---|",
        "| build | passed | 41 | done |",
        "| tests | failed: exit code 1 | 60 | 1 failed / 2 |",
    ]
