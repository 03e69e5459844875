"""Builds, tests, sanitizes and times the CUDA kernels on this machine's GPU: `make gpu-check`.

It takes the Python it is started with, as it is: torch with CUDA, ninja, setuptools, pytest,
pytest-timeout and pytest-benchmark; no network, and no tensorboardX; with pytest-xdist the tests
run side by side. In under ten minutes it
writes <gpu>-<date>.json and one log for each stage to GPU_CHECK_OUT (benchmarks/results/) and
prints the table. Exit status: 0 if every stage passed, 1 if one did not, 2 without a CUDA device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import results
from stages import Outcome, Stage, run_stages
from table import render

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 570.0  # seconds, for all stages: where it runs, a command may well end at 600
OURS = ("--kernel-name", "kns=pyvizllm")  # torch's kernels would take minutes
TOOLS = {
    # torch makes calls that may fail, and looks; a launch of ours that fails raises.
    "memcheck": (*OURS, "--report-api-errors", "no"),
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": (),  # has to see every kernel that writes what ours read
}


def stages(machine: dict[str, Any]) -> list[tuple[Stage, ...]]:
    """Groups, one after the other.

    On an H200 with 16 processors the tests took more than 90 seconds in 14 processes (beside
    racecheck), memcheck, synccheck and initcheck less than 90, racecheck more, and the benchmarks
    some 220.
    """
    python = sys.executable
    processes = ("-n", str(min(14, (os.cpu_count() or 1) - 1))) if has_xdist() else ()
    build = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": machine["capability"]}
    usual = Path("/usr/local/cuda")
    if shutil.which("nvcc") is None and (usual / "bin" / "nvcc").exists():
        build.setdefault("CUDA_HOME", os.environ.get("CUDA_HOME") or str(usual))
    # A warning of a torch or a driver we have not met must not hide what the kernels do here.
    pytest = (python, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider")
    timed = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/test_gpu_*.py"))
    return [
        (Stage("build", (python, "setup.py", "-q", "build_ext", "--inplace"), 120, build),),
        (
            Stage(
                "tests",
                (*pytest, *processes, "--timeout=100", "--durations=15", "tests"),
                200,
                {},
                " passed",
            ),
        ),
        tuple(sanitizer(tool) for tool in TOOLS),
        (Stage("benchmarks", (*pytest, "--timeout=100", *timed), 300, {}, " passed"),),
    ]


def has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) > 2


def sanitizer(tool: str) -> Stage:
    """One tool of compute-sanitizer over a small set of calls."""
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *TOOLS[tool]]
    command = (find_sanitizer(), *options, sys.executable, "tests/sanitized.py")
    # An allocation of its own for each tensor, so that no access lands in a neighbour's memory.
    return Stage(tool, command, 130, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def find_sanitizer() -> str:
    """compute-sanitizer on the PATH, in CUDA_HOME or in /usr/local/cuda; else its bare name."""
    name = "compute-sanitizer"
    homes = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda"), Path("/usr/local/cuda")]
    folders = [os.environ.get("PATH", ""), *(str(home / "bin") for home in homes)]
    return shutil.which(name, path=os.pathsep.join(folders)) or name


def probe() -> dict[str, Any] | None:
    """The GPU as torch sees it, asked in a process of its own: none of its memory stays taken."""
    script = "import json, results; print(json.dumps(results.gpu_machine()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise SystemExit("gpu-check: expected a torch that can be imported, got the error above")
    machine: dict[str, Any] | None = json.loads(done.stdout)
    return machine


def check(
    machine: dict[str, Any],
    groups: Sequence[Sequence[Stage]],
    cwd: Path = ROOT,
    total: float = TOTAL,
) -> int:
    """Run the stages, complete the results file, print it; return the exit status."""
    path = results.path_of(machine, results.today())
    path.unlink(missing_ok=True)  # the benchmarks write it: an older one is not this run's
    logs = results.FOLDER / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = run_stages(groups, logs, cwd, total)
    result = complete(path, machine, outcomes)
    results.write(result)
    print("\n" + render(result))
    print(f"\nwritten to {path}; logs in {logs}")
    failed = [outcome.stage for outcome in outcomes if not outcome.passed]
    print(f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'everything passed'}")
    return 1 if failed else 0


def complete(path: Path, machine: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the benchmarks wrote, as far as they came, with how each stage went."""
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
    else:
        result = results.result_of("make gpu-check", machine, [])
    return {**result, "stages": [asdict(outcome) for outcome in outcomes]}


def main() -> int:
    machine = probe()
    if machine is None:
        print("gpu-check: expected a CUDA device, got none", file=sys.stderr)
        return 2
    print(f"gpu-check: {machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}")
    return check(machine, stages(machine))


if __name__ == "__main__":
    sys.exit(main())
