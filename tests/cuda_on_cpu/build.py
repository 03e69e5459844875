"""Builds shared libraries that run .cu files on the CPU, with the host compiler alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_toolchain import find_compiler

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_cpu"
FLAGS = (
    # g++ gives wrong numbers for vectors that are loaded through another type without the second.
    *("-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread", f"-I{HERE / 'include'}"),
)
KERNELS = tuple(
    f"csrc/cuda/{name}.cu"
    for name in (
        *("adamw", "cross_entropy", "cross_entropy_options", "first_nonfinite", "scale"),
        *("sketch", "tensor_stats"),
    )
)
EXPORTS = "tests/cuda_on_cpu/exports.cpp"


def build(name: str, *sources: str) -> Path:
    """Return the library of the given files and the runtime, built where anything has changed."""
    compiler = find_compiler(os.environ)
    sources = (*sources, "tests/cuda_on_cpu/runtime.cpp")
    headers = [*HERE.glob("include/*.h"), *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*h")]
    state = hashlib.sha256(repr((compiler, FLAGS, sources)).encode())
    for path in sorted([*headers, *(ROOT / source for source in sources)]):
        state.update(path.read_bytes())
    library = BUILD / f"{name}-{state.hexdigest()[:16]}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        target = str(library.with_suffix(f".{Path(source).stem}.{os.getpid()}.o"))
        command = [*compiler.command, "-x", "c++", *FLAGS, "-c", source, "-o", target]
        subprocess.run(command, cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    # Symbolic: the library's own __assert_fail, not that of the C library.
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    link = [*compiler.command, "-shared", "-pthread", "-Wl,-Bsymbolic", *objects]
    subprocess.run([*link, "-ldl", "-o", str(unfinished)], cwd=ROOT, check=True)
    unfinished.rename(library)
    for path in objects:
        Path(path).unlink()
    return library
