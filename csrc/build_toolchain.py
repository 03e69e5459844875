"""What the build found on this machine: torch, the C++ compiler, the CUDA toolkit, ninja.

Every function reads its environment from its arguments, so that the tests can invent machines. What
is missing is raised as a BuildError: one sentence that says what to install.
"""

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = "2.11"
PINNED_TORCH = "torch==2.13.0"  # fetched where there is none; the one the project is tested with

# The runtime check in csrc/cpu/dispatch.cpp must ask for exactly these features.
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
X86_CAPABILITIES: dict[str, tuple[str, ...]] = {
    "DEFAULT": ("-march=x86-64",),
    "AVX2": ("-march=x86-64", *_AVX2),
    "AVX512": ("-march=x86-64", *_AVX2, *_AVX512),
}


class BuildError(SystemExit):
    """Ends the build with one sentence; as a SystemExit it is shown without a traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"pyvizllm build: {sentence}")


@dataclass(frozen=True)
class Torch:
    root: Path  # the package folder, with include/ and lib/
    version: str
    cuda: str | None  # "13.0", or None for a CPU build


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str  # the first line of `--version`

    @property
    def program(self) -> str:
        """The compiler itself, in "ccache g++" as in "g++ -m64"."""
        return next(word for word in self.command if Path(word).name != "ccache")


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (2, 13, 0) for "2.13.0+cpu", (2, 14, 0) for "2.14.0a1"."""
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise BuildError(f"expected a version such as 2.13.0, got {version!r}.")
    return tuple(int(number) for number in match[0].split("."))


def find_torch() -> Torch | None:
    """Return the torch that `import torch` would load, without loading it (3 s)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    values = runpy.run_path(str(root / "version.py"))
    return Torch(root, values["__version__"], values["cuda"])


def require_torch(torch: Torch | None) -> Torch:
    if torch is None:
        raise BuildError(
            f"expected torch >= {MINIMUM_TORCH} in this environment, got none; "
            f"install it first: pip install {PINNED_TORCH}."
        )
    if release(torch.version) < release(MINIMUM_TORCH):
        raise BuildError(
            f"expected torch >= {MINIMUM_TORCH}, got torch {torch.version} in {torch.root}; "
            f"upgrade it first: pip install {PINNED_TORCH}."
        )
    return torch


def find_pybind11(torch: Torch | None) -> Path | None:
    """Return the headers of this environment's `pybind11` package, else the copy torch brings."""
    spec = importlib.util.find_spec("pybind11")
    package = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    folders = package if torch is None else [*package, torch.root]
    for folder in folders:
        if (folder / "include" / "pybind11" / "pybind11.h").is_file():
            return folder / "include"
    return None


def require_pybind11(torch: Torch) -> Path:
    include = find_pybind11(torch)
    if include is None:
        raise BuildError(
            f"expected pybind11's headers, got neither the package nor torch's copy in "
            f"{torch.root}; install it: pip install pybind11."
        )
    return include


def find_compiler(environ: Mapping[str, str]) -> Compiler:
    """Return the C++20 compiler: the one CXX names, else c++, g++ or clang++ on the PATH."""
    install = "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
    path = environ.get("PATH")
    named = tuple(shlex.split(environ.get("CXX", "")))
    candidates = [named] if named else [("c++",), ("g++",), ("clang++",)]
    found = [command for command in candidates if shutil.which(command[0], path=path)]
    if not found:
        what = f"CXX={shlex.join(named)}, which is not there" if named else "none on the PATH"
        raise BuildError(f"expected a C++ compiler, got {what}; {install} or set CXX.")
    command = found[0]
    probe = "#include <bit>\n#include <concepts>\nstatic_assert(std::integral<int>);\n"
    arguments = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    checked = subprocess.run(arguments, input=probe, capture_output=True, text=True)
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True)
    version = (shown.stdout.splitlines() or [shlex.join(command)])[0]
    if checked.returncode != 0:
        raise BuildError(
            "expected a compiler that knows C++20 (g++ >= 10 or clang++ >= 12), "
            f"got {version}; {install} or set CXX."
        )
    return Compiler(command, version)


def find_ninja(environ: Mapping[str, str]) -> str | None:
    """Return the ninja of this environment's `ninja` package, else the one on the PATH.

    The package first: ninjas of two versions in turn would each time build everything anew.
    """
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        program = os.path.join(ninja.BIN_DIR, "ninja")
        if os.access(program, os.X_OK):
            return program
    return shutil.which("ninja", path=environ.get("PATH"))


def require_ninja(environ: Mapping[str, str]) -> str:
    ninja = find_ninja(environ)
    if ninja is None:
        raise BuildError("expected ninja on the PATH, got none; install it: pip install ninja.")
    return ninja


def find_launcher(environ: Mapping[str, str], compiler: Compiler) -> tuple[str, ...]:
    """Return ("…/ccache",) where it is installed and CXX does not call it already."""
    ccache = shutil.which("ccache", path=environ.get("PATH"))
    called = Path(compiler.command[0]).name == "ccache"
    return () if ccache is None or called else (ccache,)


def cpu_capabilities(machine: str = platform.machine()) -> dict[str, tuple[str, ...]]:
    """Return the flags of each instruction set the CPU kernels are compiled for, lowest first."""
    if machine.lower() in ("x86_64", "amd64"):
        return X86_CAPABILITIES
    return {"DEFAULT": ()}  # arm64 has NEON in its baseline


def require_linux(system: str = sys.platform) -> None:
    if system != "linux":
        raise BuildError(f"expected Linux (x86-64 or arm64), got {system}.")


def run_quietly(command: Sequence[str], what: str) -> str:
    """Return what a tool prints on both its streams; a failure is a BuildError."""
    try:
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise BuildError(f"expected {what} to run, got: {error}.") from None
    except subprocess.CalledProcessError as error:
        raise BuildError(f"expected {what} to run, got: {error.stdout.strip()}") from None
    return done.stdout
