"""The benchmarks take minutes and run by hand; that they still fit the package is tested here."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_benchmark_can_be_collected() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    for name in ("cross_entropy", "tensor_stats", "training"):
        assert f"benchmarks/test_{name}.py::" in result.stdout
