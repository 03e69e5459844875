"""The build's decisions on invented machines, and the promises of the objects it made here."""

import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import build_backend
import build_cuda
import build_graph
import build_toolchain
import pytest
import torch
from build_toolchain import BuildError, Compiler, Torch

from pyvizllm import _events
from pyvizllm.ops import _extension

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = Torch(Path("/torch"), "2.13.0+cpu", None)
NOTHING = {"PATH": "/nonexistent"}
SOURCES = ["csrc/cuda/scale.cu"]
CUDA_13 = ["75", "80", "86", "87", "88", "89", "90", "100", "110", "103", "120", "121"]


def program(path: Path, script: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(home: Path, version: str = "13.0", architectures: str = "80 90 100 120") -> Path:
    """Make a folder that answers like a CUDA toolkit and return its nvcc."""
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    script = f"""case $1 in
    --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
    --version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
    --list-gpu-arch) for a in {architectures}; do echo compute_$a; done ;;
    *) exit 3 ;; esac"""
    return program(home / "bin" / "nvcc", script)


# --- CUDA: with which toolkit, for which architectures


def test_force_cuda_without_a_toolkit_says_what_to_install() -> None:
    with pytest.raises(BuildError) as raised:
        build_cuda.decide_cuda(NOTHING | {"FORCE_CUDA": "1"}, [], CPU_TORCH, SOURCES)
    assert str(raised.value) == (
        "pyvizllm build: FORCE_CUDA=1: expected a CUDA toolkit, got no nvcc in CUDA_HOME, "
        "CUDA_PATH, on the PATH or in the nvidia wheels; install CUDA 13 and name its folder in "
        "CUDA_HOME, or unset FORCE_CUDA."
    )


def test_without_a_toolkit_the_cpu_kernels_are_built_alone() -> None:
    cuda = build_cuda.decide_cuda(NOTHING, [], CPU_TORCH, SOURCES)
    assert cuda.toolkit is None
    assert cuda.reason.startswith("no nvcc in CUDA_HOME")


def test_force_cuda_0_and_a_tree_without_cuda_sources_need_no_toolkit(tmp_path: Path) -> None:
    nvcc = toolkit(tmp_path)
    environ = {"PATH": str(nvcc.parent), "FORCE_CUDA": "0"}
    assert build_cuda.decide_cuda(environ, [], CPU_TORCH, SOURCES).reason == "FORCE_CUDA=0"
    environ["FORCE_CUDA"] = "1"
    no_sources = build_cuda.decide_cuda(environ, [], CPU_TORCH, [])
    assert (no_sources.toolkit, no_sources.reason) == (None, "there are no .cu files")
    with pytest.raises(BuildError, match="FORCE_CUDA: expected 0 or 1, got 'yes'"):
        build_cuda.decide_cuda({"FORCE_CUDA": "yes"}, [], CPU_TORCH, SOURCES)


def test_the_toolkit_is_found_through_a_wrapper_script(tmp_path: Path) -> None:
    real = toolkit(tmp_path / "cuda-13.0")
    wrapper = program(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    environ = {"PATH": str(wrapper.parent)}
    cuda = build_cuda.decide_cuda(environ, [], CPU_TORCH, SOURCES)
    assert cuda.toolkit == build_cuda.Toolkit(
        real, tmp_path / "cuda-13.0/include", tmp_path / "cuda-13.0/lib64", "13.0"
    )
    assert cuda.architectures == ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120")


def test_cuda_home_goes_before_the_path_and_wheels_come_last(tmp_path: Path) -> None:
    named, on_path = toolkit(tmp_path / "named"), toolkit(tmp_path / "path")
    wheel = toolkit(tmp_path / "site-packages/nvidia/cu13")
    folders = [str(tmp_path / "site-packages")]
    environ = {"CUDA_HOME": str(tmp_path / "named"), "PATH": str(on_path.parent)}
    assert build_cuda.find_nvcc(environ, folders) == named
    environ["CUDA_HOME"] = str(tmp_path / "no such folder")
    assert build_cuda.find_nvcc(environ, folders) == on_path
    assert build_cuda.find_nvcc(NOTHING, folders) == wheel
    assert build_cuda.find_nvcc(NOTHING, []) is None


def test_a_toolkit_too_old_for_the_kernels_is_refused(tmp_path: Path) -> None:
    nvcc = toolkit(tmp_path, version="12.0", architectures="80 90")
    with pytest.raises(BuildError, match=r"of 12\.1 or newer .*, got 12\.0 .*FORCE_CUDA=0"):
        build_cuda.decide_cuda({"PATH": str(nvcc.parent)}, [], CPU_TORCH, SOURCES)


def test_an_incomplete_toolkit_is_named(tmp_path: Path) -> None:
    nvcc = toolkit(tmp_path)
    (tmp_path / "lib64/libcudart_static.a").unlink()
    with pytest.raises(BuildError, match=r"expected cuda_runtime\.h and libcudart_static\.a"):
        build_cuda.read_toolkit(nvcc)


@pytest.mark.parametrize(
    ("requested", "supported", "chosen"),
    [
        ("", CUDA_13, "sm_80 sm_90 sm_100 sm_120 compute_120"),
        ("", ["75", "80", "86", "89", "90"], "sm_80 sm_90 compute_90"),  # CUDA 12.4
        ("8.0;9.0+PTX", CUDA_13, "sm_80 sm_90 compute_90"),
        ("9.0a 12.0", CUDA_13, "sm_90a sm_120"),
        ("7.5 8.6 10.0+PTX", CUDA_13, "sm_86 sm_100 compute_100"),  # below 8.0: left out
    ],
)
def test_architectures(requested: str, supported: list[str], chosen: str) -> None:
    assert " ".join(build_cuda.choose_architectures(requested, supported)) == chosen


@pytest.mark.parametrize(
    ("requested", "sentence"),
    [
        ("Hopper", "expected numbers this toolkit knows, .* got 'Hopper'"),
        ("8.0;15.0", r"got '15\.0'"),
        ("7.5", r"expected 8\.0 or above in it, got '7\.5'"),
    ],
)
def test_architectures_that_cannot_be_built(requested: str, sentence: str) -> None:
    with pytest.raises(BuildError, match=f"TORCH_CUDA_ARCH_LIST: .*{sentence}"):
        build_cuda.choose_architectures(requested, CUDA_13)


def test_a_toolkit_of_another_major_version_than_torch_is_refused(tmp_path: Path) -> None:
    environ = {"CUDA_HOME": str(toolkit(tmp_path, "13.0").parent.parent)}
    same = Torch(Path("/torch"), "2.13.0+cu130", "13.2")
    assert build_cuda.decide_cuda(environ, [], same, SOURCES).toolkit is not None
    other = Torch(Path("/torch"), "2.11.0+cu128", "12.8")
    with pytest.raises(BuildError) as raised:
        build_cuda.decide_cuda(environ, [], other, SOURCES)
    assert "expected the CUDA 12.8 toolkit" in str(raised.value)
    assert "install CUDA 12.8 and name it in CUDA_HOME" in str(raised.value)


# --- the C++ compiler and torch


def test_no_compiler_says_what_to_install() -> None:
    with pytest.raises(BuildError, match=r"expected a C\+\+ compiler, got none.*apt install g\+\+"):
        build_toolchain.find_compiler(NOTHING)
    with pytest.raises(BuildError, match="got CXX=no-such-compiler, which is not there"):
        build_toolchain.find_compiler(NOTHING | {"CXX": "no-such-compiler"})


def test_a_compiler_without_cpp20_is_refused(tmp_path: Path) -> None:
    old = program(tmp_path / "g++", '[ "$1" = --version ] && echo "g++ 7.5.0" || exit 1')
    with pytest.raises(BuildError, match=r"knows C\+\+20 .*, got g\+\+ 7\.5\.0"):
        build_toolchain.find_compiler({"CXX": str(old)})


def test_ccache_is_used_once() -> None:
    path = os.environ["PATH"]
    called = Compiler(("ccache", "g++"), "g++ 12")
    assert build_toolchain.find_launcher({"PATH": path}, called) == ()
    assert build_toolchain.find_launcher(NOTHING, Compiler(("g++",), "g++ 12")) == ()
    assert called.program == "g++"


def test_a_missing_or_old_torch_is_refused() -> None:
    with pytest.raises(
        BuildError, match=r"got none; install it first: pip install torch==2\.13\.0"
    ):
        build_toolchain.require_torch(None)
    with pytest.raises(
        BuildError, match=r"expected torch >= 2\.11, got torch 2\.9\.1\+cu128 in /t"
    ):
        build_toolchain.require_torch(Torch(Path("/t"), "2.9.1+cu128", "12.8"))


def test_the_loader_explains_an_old_torch_and_a_missing_build() -> None:
    _extension.check_torch("2.11.0a0+git1")
    _extension.check_torch("10.0")
    with pytest.raises(ImportError, match=r"expected torch >= 2\.11, got torch 2\.9\.1\+cpu"):
        _extension.check_torch("2.9.1+cpu")
    with pytest.raises(ImportError, match=r"compiled kernels, got: .*_missing.*pip install -e \."):
        _extension.load("pyvizllm._missing")


# --- the backend that pip calls


def environment(folder: Path, packages: dict[str, str]) -> Path:
    """Make a virtual environment that seems to hold these packages; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python3.*/site-packages")
    for name, version in packages.items():
        (site / name).mkdir()
        (site / name / "__init__.py").touch()
        if name == "pybind11":
            (site / name / "include" / "pybind11").mkdir(parents=True)
            (site / name / "include" / "pybind11" / "pybind11.h").touch()
        (site / name / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
        (site / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        ({}, ["torch==2.13.0", "setuptools>=77.0.3", "ninja", "pybind11"]),
        ({"torch": "2.14.1+cu130", "setuptools": "81.0.0"}, ["ninja", "pybind11"]),
        (
            {"torch": "2.14.1+cu130", "setuptools": "81.0.0", "pybind11": "3.0.1"},
            ["ninja"],
        ),
        (
            {"torch": "2.9.0", "setuptools": "65.5.0"},
            ["torch==2.13.0", "setuptools>=77.0.3", "ninja", "pybind11"],
        ),
    ],
    ids=["empty", "torch present", "pybind11 too", "everything too old"],
)
def test_the_backend_asks_only_for_what_the_target_has_not(
    tmp_path: Path, packages: dict[str, str], expected: list[str]
) -> None:
    python = environment(tmp_path / "venv", packages)
    # As pip isolates: the target's interpreter, its packages hidden (-S), an overlay in PYTHONPATH.
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'csrc')!r}); import build_backend as b; "
        "import json; print(json.dumps(b.get_requires_for_build_editable()))"
    )
    isolated = {"PATH": "/nonexistent", "PYTHONPATH": "/overlay", "PYTHONNOUSERSITE": "1"}
    command = [str(python), "-S", "-c", script]
    shown = subprocess.run(command, env=isolated, check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout) == expected


def test_only_a_torch_fetched_by_pip_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    name = build_backend.TORCH_REQUIREMENT
    monkeypatch.setenv(name, "unset")
    build_backend.pin_fetched_torch(CPU_TORCH)
    build_backend.pin_fetched_torch(None)
    assert os.environ[name] == "unset"
    overlay = Path("/tmp/pip-build-env-x1/overlay/lib/python3.11/site-packages/torch")
    build_backend.pin_fetched_torch(Torch(overlay, "2.13.0", "13.0"))
    assert os.environ[name] == "torch==2.13.0"


def test_every_file_pins_the_same_torch() -> None:
    pins = {
        name: re.findall(r"torch==[\d.]+", (ROOT / name).read_text())
        for name in ("Makefile", "pyproject.toml", "csrc/build_toolchain.py")
    }
    assert pins == {name: [build_toolchain.PINNED_TORCH] for name in pins}


# --- the commands


def make_plan(cuda: build_cuda.Cuda, capabilities: dict[str, tuple[str, ...]]) -> build_graph.Plan:
    torch = build_toolchain.require_torch(build_toolchain.find_torch())
    return build_graph.Plan(
        torch=torch,
        compiler=build_toolchain.find_compiler(os.environ),
        launcher=(),
        capabilities=capabilities,
        cuda=cuda,
        python_include=Path(sysconfig.get_paths()["include"]),
        pybind11_include=build_toolchain.require_pybind11(torch),
        python_suffix=".python.so",
        werror=True,
    )


NO_CUDA = build_cuda.Cuda(None, (), "none here")
TWO = {"DEFAULT": (), "OTHER": ("-O1",)}


def ninja(folder: Path, *arguments: str) -> list[str]:
    """Run ninja in a project and return the files it made (or would make, with -n)."""
    program = build_toolchain.require_ninja(os.environ)
    command = [program, "-f", build_graph.GRAPH, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return sorted(re.findall(r"^\[\d+/\d+\] build/(\S+)", done.stdout, re.MULTILINE))


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    files = {
        "csrc/shared.h": "#pragma once\n",
        "csrc/registration.cpp": "int registration() { return 1; }\n",
        "csrc/cpu/dispatch.cpp": '#include "shared.h"\nint dispatch() { return 1; }\n',
        "csrc/cpu/one.cpp": '#include "shared.h"\nnamespace CPU_CAPABILITY { int one; }\n',
        "csrc/cpu/two.cpp": "namespace CPU_CAPABILITY { int two; }\n",
        "csrc/events/module.cpp": "#include <Python.h>\nint module() { return 1; }\n",
        "csrc/events/summary.cpp": '#include "shared.h"\nint summary() { return 1; }\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    plan = make_plan(NO_CUDA, TWO)
    build_graph.write_graph(plan, tmp_path)
    one = ["csrc/cpu/one.cpp.DEFAULT.o", "csrc/cpu/one.cpp.OTHER.o"]
    two = ["csrc/cpu/two.cpp.DEFAULT.o", "csrc/cpu/two.cpp.OTHER.o"]
    others = ["csrc/cpu/dispatch.cpp.o", "csrc/registration.cpp.o"]
    events = ["csrc/events/module.cpp.o", "csrc/events/summary.cpp.o", "_events.python.so"]
    assert ninja(tmp_path) == sorted(["_C.abi3.so", *one, *two, *others, *events])
    build_graph.write_graph(plan, tmp_path)
    assert ninja(tmp_path, "-n") == []
    (tmp_path / "csrc/cpu/two.cpp").touch()
    assert ninja(tmp_path, "-n") == sorted(["_C.abi3.so", *two])
    ninja(tmp_path)
    (tmp_path / "csrc/shared.h").touch()
    kernels = ["_C.abi3.so", *one, "csrc/cpu/dispatch.cpp.o"]
    assert ninja(tmp_path, "-n") == sorted([*kernels, *events[1:]])


def test_cuda_sources_get_the_flags_of_the_decision(tmp_path: Path) -> None:
    nvcc = toolkit(tmp_path / "cuda")
    for name in ("csrc/cuda/scale.cu", "csrc/registration.cpp", "csrc/cpu/scale.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cuda = build_cuda.decide_cuda(
        {"CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0+PTX"},
        [],
        CPU_TORCH,
        SOURCES,
    )
    text = build_graph.write_graph(make_plan(cuda, TWO), tmp_path).read_text()
    (rule,) = (line for line in text.splitlines() if str(nvcc) in line and "command" in line)
    assert "-gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90" in rule
    assert "fast" not in text  # -ffast-math, --use_fast_math: isnan would be folded away
    flags = dict(re.findall(r"^build build/(\S+): \w+ .*\n  flags = (.*)$", text, re.MULTILINE))
    assert "-DPYVIZLLM_WITH_CUDA" in flags["csrc/registration.cpp.o"]
    assert "-DHAVE_OTHER_CAPABILITY" in flags["csrc/registration.cpp.o"]
    assert flags["csrc/cpu/scale.cpp.OTHER.o"] == "-Icsrc -O1 -DCPU_CAPABILITY=OTHER"
    # The order matters: the linker keeps the first of two weak symbols, the baseline's.
    (linked,) = re.findall(r"^build build/_C.abi3.so: link (.*)$", text, re.MULTILINE)
    assert [name.removeprefix("build/csrc/") for name in linked.split()] == [
        "registration.cpp.o",
        "cpu/scale.cpp.DEFAULT.o",
        "cpu/scale.cpp.OTHER.o",
        "cuda/scale.cu.o",
    ]


# --- what was built here


def built_objects() -> list[Path]:
    return sorted((ROOT / "build/csrc/cpu").glob("*.AVX*.o"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set elsewhere")
def test_objects_for_newer_cpus_share_no_code_with_the_baseline() -> None:
    """A weak symbol of an AVX-512 object could be the copy that an older CPU gets to run."""
    assert built_objects(), "expected objects in build/: run `make build`"
    for path in built_objects():
        capability = path.suffixes[-2].removeprefix(".")
        listed = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True)
        symbols = re.findall(r"^[0-9a-f]+ (\w) (.+)$", listed.stdout, re.MULTILINE)
        # DW.ref.*: a pointer to the C++ runtime, for exceptions; no code.
        shared = [
            name
            for kind, name in symbols
            if kind in "WVuwv" and not re.match(rf".*{capability}::|DW\.ref\.", name)
        ]
        assert shared == [], path.name
        # Constructors of globals run when the library is loaded, on any CPU.
        constructors = [name for _, name in symbols if "_GLOBAL__sub_I" in name]
        assert constructors == [], path.name
        functions = [name for kind, name in symbols if kind == "T"]
        assert functions, path.name
        assert all(f"{capability}::" in name for name in functions), path.name


def library() -> Path:
    return Path(sys.modules["pyvizllm._C"].__file__ or "")


def test_the_library_needs_torch_only_through_its_stable_names() -> None:
    assert library().name == "_C.abi3.so"
    command = ["readelf", "-d", str(library())]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", shown)
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)  # libtorch.so leads to libtorch_cuda
    assert not [name for name in needed if "cuda" in name or "python" in name]
    assert "PATH" not in shown  # no RPATH or RUNPATH: `import torch` comes first
    torch_root = str(Path(torch.__file__).parent)
    for folder in (str(ROOT), torch_root):  # __FILE__ in errors: csrc/..., torch/include/...
        assert folder.encode() not in library().read_bytes()


def test_pybind11_is_the_packages_or_torchs(tmp_path: Path) -> None:
    torch_root = Path(torch.__file__).parent
    assert build_toolchain.find_pybind11(None) in (None, *map(Path, _pybind11_package()))
    found = build_toolchain.require_pybind11(Torch(torch_root, "2.13.0", None))
    assert (found / "pybind11" / "pybind11.h").is_file()
    if not _pybind11_package():
        with pytest.raises(BuildError, match=r"expected pybind11's headers.*pip install pybind11"):
            build_toolchain.require_pybind11(Torch(tmp_path, "2.13.0", None))


def _pybind11_package() -> list[str]:
    spec = importlib.util.find_spec("pybind11")
    return [] if spec is None else [f"{spec.submodule_search_locations[0]}/include"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other instructions elsewhere")
def test_events_run_on_every_x86_64_and_without_torch() -> None:
    """Nothing beyond the baseline but the checksum's instruction, in a function of its own."""
    library = Path(_events.__file__)
    shown = subprocess.run(
        ["readelf", "-d", str(library)], check=True, capture_output=True, text=True
    ).stdout
    assert not [name for name in re.findall(r"NEEDED.*\[(.+)\]", shown) if "torch" in name]
    assert "PATH" not in shown
    code = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    function, special = "", set()
    for line in code.splitlines():
        if begins := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = begins[1]
        elif re.search(r"\t(v\w+|crc32\w*|popcnt) ", line):
            special.add(function)
    assert special, "expected the checksum's instruction somewhere"
    assert all("crc32c_sse42" in name for name in special), special


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit on this machine")
def test_the_real_toolkit_is_found() -> None:
    nvcc = build_cuda.find_nvcc({"PATH": os.environ["PATH"]}, [])
    assert nvcc is not None
    found = build_cuda.read_toolkit(nvcc)
    assert (found.include / "cuda_runtime.h").is_file()
    assert "90" in build_cuda.supported_architectures(found)
