"""The compile and link commands as a build.ninja: own flags for each file, exact header
dependencies for .cpp and .cu alike, and objects that stay in build/ from one build to the next.

Paths are relative to the project, where ninja runs: `__FILE__` in an error message then says
csrc/registration.cpp, and ccache serves every checkout.
"""

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from build_cuda import Cuda
from build_toolchain import Compiler, Torch

STABLE_ABI = "0x020b000000000000"  # torch 2.11: one binary for it and all that follow
LIMITED_API = "0x030a0000"  # Python 3.10, likewise
LIBRARY = "build/_C.abi3.so"
EVENTS = "build/_events"  # and the ending of one interpreter's extension modules
GRAPH = "build/build.ninja"
REPORT = ".report"  # after an object's name: what ptxas says of its kernels

# -fno-math-errno, -fno-trapping-math: nobody reads errno or the exception flags; values are the
# same, NaN and Inf included, and loops with sqrt or a comparison vectorise. Never -ffast-math.
LANGUAGE = ("-std=c++20", "-O3")
LIBRARY_CODE = ("-fPIC", "-fvisibility=hidden")
FLOATING = ("-fno-math-errno", "-fno-trapping-math")
WARNINGS = ("-Wall", "-Wextra")

Compilation = tuple[str, str, str, str]  # source, object, rule, flags


@dataclass(frozen=True)
class Plan:
    """All decisions of one build."""

    torch: Torch
    compiler: Compiler
    launcher: tuple[str, ...]  # ccache, or nothing
    capabilities: dict[str, tuple[str, ...]]
    cuda: Cuda
    python_include: Path
    pybind11_include: Path
    python_suffix: str  # ".cpython-311-x86_64-linux-gnu.so"
    werror: bool

    def describe(self) -> str:
        """Return the line that says what was decided."""
        cuda = f"no CUDA kernels: {self.cuda.reason}"
        if self.cuda.toolkit is not None:
            names = " ".join(self.cuda.architectures)
            cuda = f"CUDA {self.cuda.toolkit.version} kernels for {names} ({self.cuda.reason})"
        return (
            f"pyvizllm build: torch {self.torch.version} ({self.torch.root}); "
            f"{self.compiler.version}; CPU kernels for {' '.join(self.capabilities)}; {cuda}"
        )

    def config(self) -> str:
        """Return the decisions as the JSON that is installed for `pyvizllm info`."""
        toolkit = self.cuda.toolkit
        values = {
            "torch": self.torch.version,
            "compiler": self.compiler.version,
            "cpu_capabilities": list(self.capabilities),
            "cuda": None if toolkit is None else toolkit.version,
            "cuda_architectures": list(self.cuda.architectures),
            "cuda_reason": self.cuda.reason,
        }
        return json.dumps(values, indent=1) + "\n"


def sources(root: Path, pattern: str) -> list[str]:
    """Return the files below `root` that match, relative to it, in a fixed order."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))


def write_graph(plan: Plan, root: Path) -> Path:
    """Write build/build.ninja and return its path."""
    path = root / GRAPH
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(_lines(plan, root)) + "\n")
    return path


def _quote(arguments: tuple[str, ...] | list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _lines(plan: Plan, root: Path) -> Iterator[str]:
    compiler = _quote(plan.launcher + plan.compiler.command)
    warnings = WARNINGS + (("-Werror",) if plan.werror else ())
    yield "# written by setup.py at each build"
    yield "builddir = build"
    yield "rule cxx"
    flags = _quote(LANGUAGE + LIBRARY_CODE + FLOATING + warnings)
    yield f"  command = {compiler} {flags} $flags -MD -MF $out.d -c $in -o $out"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    yield "  description = $out"
    if plan.cuda.toolkit is not None:
        yield from _nvcc_rule(plan)
    yield "rule link"
    yield f"  command = {_quote(plan.compiler.command)} -shared $in -o $out $libraries"
    yield "  description = $out"
    yield from _library(LIBRARY, _compilations(plan, root), _link_flags(plan))
    yield from _library(f"{EVENTS}{plan.python_suffix}", _event_compilations(plan, root), "")


def _library(library: str, compilations: Iterable[Compilation], link_flags: str) -> Iterator[str]:
    objects: list[str] = []
    for source, target, rule, compile_flags in compilations:
        objects.append(target)
        yield f"build {target}: {rule} {source}"
        if compile_flags:
            yield f"  flags = {compile_flags}"
    if objects:
        yield f"build {library}: link {' '.join(objects)}"
        yield f"  libraries = {link_flags}"
        yield f"default {library}"


def _nvcc_rule(plan: Plan) -> Iterator[str]:
    assert plan.cuda.toolkit is not None
    host = LIBRARY_CODE + WARNINGS + (("-Werror",) if plan.werror else ())
    flags = [*LANGUAGE, "--threads=2", "-Xptxas=-v", f"-ccbin={plan.compiler.program}"]
    flags += [f"-Xcompiler={','.join(host)}", "-Icsrc"]
    flags += ["-Werror=all-warnings"] if plan.werror else []
    for name in plan.cuda.architectures:
        number = name.partition("_")[2]
        flags.append(f"-gencode=arch=compute_{number},code={name}")
    nvcc = _quote((*plan.launcher, str(plan.cuda.toolkit.nvcc)))
    # What ptxas says of registers and spills stays beside the object, for the tests; the rest of
    # the messages is shown.
    show = f"grep -vE 'ptxas info|bytes stack frame' $out{REPORT} >&2"
    yield "rule nvcc"
    yield f"  command = {nvcc} {_quote(flags)} -MD -MF $out.d -c $in -o $out 2> $out{REPORT}; $"
    yield f"    status=$$?; {show}; exit $$status"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    yield "  description = $out"


def _compilations(plan: Plan, root: Path) -> Iterator[Compilation]:
    """Yield what _C is made of, in the order in which the objects are linked.

    Lowest instruction set first: where two objects hold the same weak symbol (an inline function of
    the standard library), the linker keeps the first, so that code for an older CPU never calls a
    copy with instructions the CPU has not. Code for a newer one may well call an older copy.
    """
    baseline = plan.capabilities["DEFAULT"]
    have = tuple(f"-DHAVE_{name}_CAPABILITY" for name in plan.capabilities if name != "DEFAULT")
    torch: tuple[str, ...] = (
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
        f"-DPy_LIMITED_API={LIMITED_API}",
        *("-isystem", str(plan.torch.root / "include")),
        # Its checks name the file they stand in: torch/include/..., wherever it is installed.
        f"-ffile-prefix-map={plan.torch.root}=torch",
        *("-isystem", str(plan.python_include)),
    )
    if plan.cuda.toolkit is not None:
        torch += ("-DPYVIZLLM_WITH_CUDA", "-isystem", str(plan.cuda.toolkit.include))
    for source in sources(root, "csrc/*.cpp"):
        flags = _quote(("-Icsrc", *baseline, *have, *torch))
        yield source, f"build/{source}.o", "cxx", flags
    dispatch = "csrc/cpu/dispatch.cpp"
    kernels = sources(root, "csrc/cpu/*.cpp")
    if dispatch in kernels:
        kernels.remove(dispatch)
        yield dispatch, f"build/{dispatch}.o", "cxx", _quote(("-Icsrc", *baseline, *have))
    for name, capability in plan.capabilities.items():
        for source in kernels:
            flags = _quote(("-Icsrc", *capability, f"-DCPU_CAPABILITY={name}"))
            yield source, f"build/{source}.{name}.o", "cxx", flags
    if plan.cuda.toolkit is not None:
        for source in sources(root, "csrc/cuda/*.cu"):
            yield source, f"build/{source}.o", "nvcc", ""


def _event_compilations(plan: Plan, root: Path) -> Iterator[Compilation]:
    """Yield what _events is made of: for the lowest instruction set, and without torch.

    A sum in another order is another bucket's edge: no fused multiply-add, so that every machine
    writes the same file.
    """
    flags = ("-Icsrc", *plan.capabilities["DEFAULT"], "-ffp-contract=off")
    python = ("-isystem", str(plan.python_include), "-isystem", str(plan.pybind11_include))
    for source in sources(root, "csrc/events/*.cpp"):
        of_source = (*flags, *python) if source.endswith("/module.cpp") else flags
        yield source, f"build/{source}.o", "cxx", _quote(of_source)


def _link_flags(plan: Plan) -> str:
    # --no-as-needed: nothing of libtorch.so itself is called, but only through it (in a CUDA build
    # of torch) does the loader find the symbols of libtorch_cuda, which are weak in _C.
    flags = [f"-L{plan.torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    flags += ["-lc10", "-Wl,--as-needed"]
    if plan.cuda.toolkit is not None:
        flags += [f"-L{plan.cuda.toolkit.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        # torch brings a libcudart of its own: ours must neither replace it nor be replaced by it.
        flags += ["-Wl,--exclude-libs,ALL"]
    return _quote(flags)
