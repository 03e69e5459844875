"""`make gpu-check` without a GPU: its stages fail, hang, leave children and are all reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import results
import torch
from stages import Stage, run_stages

MACHINE = {"gpu": "Some GPU", "driver": "1.2", "torch": "9.9", "capability": "9.0"}


def python(name: str, script: str, limit: float = 60, **environ: str) -> Stage:
    return Stage(name, (sys.executable, "-c", script), limit, environ)


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_stage_is_reported_and_none_stops_another(tmp_path: Path) -> None:
    groups = [
        [python("good", "print('== 3 passed in 1 s ==')")],
        [python("bad", "import sys; print('why'); sys.exit(3)")],
        [Stage("missing", ("/nonexistent/tool",), 60)],
        [python("told", "import os; print(os.environ['WORD'])", WORD="word")],
    ]
    outcomes = run_stages(groups, tmp_path, tmp_path, total=60)
    assert [(o.stage, o.result, o.note) for o in outcomes] == [
        ("good", "passed", "3 passed in 1 s"),
        ("bad", "failed: exit code 3", "why"),
        ("missing", "failed: /nonexistent/tool: No such file or directory", ""),
        ("told", "passed", "word"),
    ]
    assert [o.passed for o in outcomes] == [True, False, False, True]
    assert (tmp_path / "bad.log").read_text() == "why\n"


def test_a_stage_in_which_nothing_ran_has_not_passed(tmp_path: Path) -> None:
    skipped = (sys.executable, "-c", "print('=== 3 skipped in 0.1s ===')")
    (outcome,) = run_stages([[Stage("tests", skipped, 30, {}, " passed")]], tmp_path, tmp_path, 60)
    assert not outcome.passed
    assert outcome.result == "failed: expected ' passed' in the last line"


def test_a_stage_over_its_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    script = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
    begin = time.monotonic()
    (outcome,) = run_stages([[python("slow", script, limit=6)]], tmp_path, tmp_path, total=60)
    assert (outcome.result, outcome.passed) == ("stopped after 6 s", False)
    assert 6 <= outcome.seconds <= time.monotonic() - begin < 30
    deadline = time.monotonic() + 10
    while is_running(int(outcome.note)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(outcome.note))


def test_stages_of_a_group_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other's file."""
    script = """
import pathlib, sys, time
pathlib.Path(NAME).touch()
while not pathlib.Path(OTHER).exists():
    time.sleep(0.01)
"""
    group = [
        python(name, f"NAME, OTHER = {name!r}, {other!r}\n{script}", limit=30)
        for name, other in (("a", "b"), ("b", "a"))
    ]
    outcomes = run_stages([group], tmp_path, tmp_path, total=60)
    assert [(o.stage, o.result) for o in outcomes] == [("a", "passed"), ("b", "passed")]


def test_no_stage_is_started_when_no_time_is_left(tmp_path: Path) -> None:
    (outcome,) = run_stages([[python("late", "print('ran')")]], tmp_path, tmp_path, total=2)
    assert outcome.result == "not run: no time was left"
    assert not (tmp_path / "late.log").exists()


def test_results_file_keeps_what_the_benchmarks_wrote(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    path = results.path_of(MACHINE, results.today())
    path.write_text("of an earlier run")
    measured = results.result_of("make gpu-check", {**MACHINE, "copy_gb_per_s": 3000.0}, [])
    script = f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(measured)!r})"
    groups = [[python("benchmarks", script)], [python("bad", "raise SystemExit('broken')")]]
    assert gpu_check.check(MACHINE, groups, tmp_path, total=60) == 1
    result = json.loads(path.read_text())
    assert result["machine"]["copy_gb_per_s"] == 3000.0
    assert [(s["stage"], s["result"]) for s in result["stages"]] == [
        ("benchmarks", "passed"),
        ("bad", "failed: exit code 1"),
    ]
    output = capsys.readouterr().out
    assert "| bad | failed: exit code 1 | 0 | broken |" in output
    assert output.endswith("gpu-check: failed: bad\n")


def test_without_benchmarks_the_stages_are_written_all_the_same(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert gpu_check.check(MACHINE, [[python("build", "pass")]], tmp_path, total=60) == 0
    (path,) = tmp_path.glob("some-gpu-*.json")
    result = json.loads(path.read_text())
    assert (result["comparisons"], result["machine"]) == ([], MACHINE)
    assert result["stages"][0]["stage"] == "build"


def test_stages_of_this_machine() -> None:
    groups = gpu_check.stages(MACHINE)
    names = [[stage.name for stage in group] for group in groups]
    tools = ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert names == [["build"], ["tests"], tools, ["benchmarks"]]
    build = groups[0][0]
    assert build.environ == {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    timed = [word for word in groups[3][0].command if word.startswith("benchmarks/")]
    assert "benchmarks/test_gpu_tensor_stats.py" in timed
    assert "benchmarks/test_gpu_cross_entropy.py" in timed
    for stage in (stage for group in groups for stage in group):
        for word in stage.command:
            assert not word.endswith(".py") or (gpu_check.ROOT / word).exists(), word


def test_sanitized_calls_agree_with_the_cpu_on_the_cpu() -> None:
    """The program that compute-sanitizer runs, and that it runs everything it says."""
    command = [sys.executable, "tests/sanitized.py", "cpu"]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agree with the CPU's") == 6


def test_without_a_gpu_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert results.gpu_machine() is None
    monkeypatch.setattr(gpu_check, "probe", results.gpu_machine)
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "gpu-check: expected a CUDA device, got none\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: it would run it all")
def test_make_gpu_check_without_a_gpu() -> None:
    environ = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["make", "-s", "gpu-check"],
        cwd=gpu_check.ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "gpu-check: expected a CUDA device, got none" in done.stderr
