"""Every CUDA kernel compiles for every architecture, without a warning, a spill or local memory.

Needs nvcc, and no GPU; where the build is up to date, nothing is compiled again. A stack frame or a
spill means that what should be registers (a thread's tile of a row) lies in memory: the numbers
stay right and the speed is lost.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_cuda import ARCHITECTURES, Toolkit, find_nvcc, read_toolkit
from build_graph import GRAPH, LANGUAGE, REPORT
from build_toolchain import find_compiler, find_ninja

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path.name for path in ROOT.glob("csrc/cuda/*.cu"))

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel."""

    name: str  # mangled
    architecture: str
    stack: int  # bytes per thread, as the spills
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int  # bytes per block


@dataclass(frozen=True)
class Compilation:
    returncode: int
    output: str
    kernels: tuple[Kernel, ...]


def find_toolkit() -> Toolkit | None:
    nvcc = find_nvcc(os.environ, sys.path)
    return None if nvcc is None else read_toolkit(nvcc)


def parse_report(report: str) -> tuple[Kernel, ...]:
    kernels = []
    for match in ENTRY.finditer(report):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                *(match["name"], match["architecture"]),
                *(int(match[key]) for key in ("stack", "stores", "loads", "registers")),
                0 if shared is None else int(shared[1]),
            )
        )
    return tuple(kernels)


def built(source: str) -> Compilation | None:
    """What ptxas said when `source` was built, if that is up to date."""
    target = f"build/csrc/cuda/{source}.o"
    report = ROOT / (target + REPORT)
    ninja = find_ninja(os.environ)
    if ninja is None or not report.exists():
        return None
    asked = subprocess.run(
        [ninja, "-f", GRAPH, "-n", target], cwd=ROOT, capture_output=True, text=True
    )
    if asked.returncode != 0 or "no work to do" not in asked.stdout:
        return None
    return Compilation(0, report.read_text(), parse_report(report.read_text()))


def compile_now(toolkit: Toolkit, source: str, target: Path) -> Compilation:
    command = [
        *(str(toolkit.nvcc), *LANGUAGE, "--threads=2", "-fatbin", "-Xptxas=-v"),
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES),
        *("-Werror=all-warnings", f"-ccbin={find_compiler(os.environ).program}"),
        *("-o", str(target), f"csrc/cuda/{source}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    return Compilation(done.returncode, output, parse_report(output))


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compilation]:
    """The build's, as far as it has compiled what the sources are now for all architectures."""
    toolkit = find_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc in CUDA_HOME, CUDA_PATH, on the PATH or in the nvidia wheels")
    folder = tmp_path_factory.mktemp("fatbin")
    wanted = {f"sm_{number}" for number in ARCHITECTURES}
    result = {}
    for source in SOURCES:
        compilation = built(source)
        if compilation is None or {kernel.architecture for kernel in compilation.kernels} != wanted:
            compilation = compile_now(toolkit, source, folder / source)
        result[source] = compilation
    return result


@pytest.mark.parametrize("number", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings_spills_or_local_memory(source, number, compilations):
    compilation = compilations[source]
    assert compilation.returncode == 0, compilation.output
    assert "warning" not in compilation.output
    kernels = [k for k in compilation.kernels if k.architecture == f"sm_{number}"]
    declared = set(
        re.findall(r"^\s*(\w+_kernel)\(", (ROOT / "csrc/cuda" / source).read_text(), re.M)
    )
    assert declared
    for name in declared:
        assert any(name in kernel.name for kernel in kernels), f"{name} is not compiled"
    for kernel in kernels:
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), kernel
        # What a block may use without asking, and 256 threads of the register file.
        assert kernel.shared <= 48 * 1024, kernel
        assert kernel.registers <= 255, kernel


def test_report_of_a_spilling_kernel_is_understood():
    """The test above is only as good as its reading of the report."""
    report = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z9op_kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z9op_kernelPf
    48 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z12other_kernelv' for 'sm_90'
ptxas info    : Function properties for _Z12other_kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert parse_report(report) == (
        Kernel("_Z9op_kernelPf", "sm_90", 48, 16, 20, 255, 1024),
        Kernel("_Z12other_kernelv", "sm_90", 0, 0, 0, 8, 0),
    )
