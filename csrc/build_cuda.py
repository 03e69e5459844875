"""Whether the CUDA kernels are built, with which toolkit, and for which architectures."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_toolchain import BuildError, Torch, release, run_quietly

# One per family: A100, H100, B200, RTX 50. The newest also as PTX, for what comes after it.
ARCHITECTURES = ("80", "90", "100", "120")
MINIMUM_ARCHITECTURE = 80  # bfloat16 arithmetic
MINIMUM_TOOLKIT = (12, 1)  # kernel parameters above 4 KB


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path  # the real one, behind any wrapper script
    include: Path
    library: Path  # holds libcudart_static.a
    version: str  # "13.0"


@dataclass(frozen=True)
class Cuda:
    """The decision: without a toolkit no CUDA kernel is built. `reason` completes the sentence."""

    toolkit: Toolkit | None
    architectures: tuple[str, ...]  # "sm_80", ..., "compute_120" for PTX
    reason: str


def find_nvcc(environ: Mapping[str, str], folders: Sequence[str]) -> Path | None:
    """Return nvcc of CUDA_HOME or CUDA_PATH, else on the PATH, else of NVIDIA's wheels."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    for home in homes:
        nvcc = Path(home) / "bin" / "nvcc"
        if os.access(nvcc, os.X_OK):
            return nvcc
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if on_path is not None:
        return Path(on_path)
    for folder in folders:
        for nvcc in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            if os.access(nvcc, os.X_OK):
                return nvcc
    return None


def read_toolkit(nvcc: Path) -> Toolkit:
    """Ask nvcc where its toolkit is: its own path says nothing where it is a wrapper script."""
    dry = run_quietly([str(nvcc), "--dryrun", "-x", "cu", os.devnull], f"{nvcc} --dryrun")
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    shown = run_quietly([str(nvcc), "--version"], f"{nvcc} --version")
    version = re.search(r"release (\d+\.\d+)", shown)
    if top is None or version is None:
        raise BuildError(f"expected {nvcc} to be NVIDIA's compiler, got {shown.strip()!r}.")
    home = Path(top[1]).resolve()
    folders = [home, *sorted((home / "targets").glob("*-linux"))]
    include = [folder / "include" for folder in folders]
    library = [folder / name for folder in folders for name in ("lib64", "lib")]
    with_header = [folder for folder in include if (folder / "cuda_runtime.h").is_file()]
    with_runtime = [folder for folder in library if (folder / "libcudart_static.a").is_file()]
    if not with_header or not with_runtime:
        raise BuildError(
            f"expected cuda_runtime.h and libcudart_static.a beside nvcc in {home}, got an "
            "incomplete toolkit; install the rest of it (wheels: pip install nvidia-cuda-runtime "
            "nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl), or set FORCE_CUDA=0."
        )
    return Toolkit(home / "bin" / "nvcc", with_header[0], with_runtime[0], version[1])


def supported_architectures(toolkit: Toolkit) -> list[str]:
    """Return what the toolkit compiles for, as ["75", "80", ...]."""
    listed = run_quietly([str(toolkit.nvcc), "--list-gpu-arch"], "nvcc --list-gpu-arch")
    return re.findall(r"compute_(\d+)\b", listed)


def choose_architectures(requested: str, supported: Sequence[str]) -> tuple[str, ...]:
    """Return the code to build, as ("sm_80", ..., "compute_120").

    requested: TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", blanks or semicolons), or "" for the default.
    Those below 8.0, often named in images made for many packages, are left out.
    """
    if not requested.strip():
        chosen = [number for number in ARCHITECTURES if number in supported]
        if not chosen:
            raise BuildError(
                f"expected a CUDA toolkit that knows one of sm_{', sm_'.join(ARCHITECTURES)}, "
                f"got one for {', '.join(supported)}; install CUDA 13."
            )
        return (*(f"sm_{number}" for number in chosen), f"compute_{chosen[-1]}")
    real, virtual = [], []
    for name in requested.replace(";", " ").replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None or match[1] + match[2] not in supported:
            raise BuildError(
                "TORCH_CUDA_ARCH_LIST: expected numbers this toolkit knows, such as 8.0;9.0+PTX "
                f"({', '.join(supported)}), got {name!r}."
            )
        if int(match[1] + match[2]) < MINIMUM_ARCHITECTURE:
            continue
        real.append(f"sm_{match[1]}{match[2]}{match[3]}")
        if match[4]:
            virtual.append(f"compute_{match[1]}{match[2]}{match[3]}")
    if not real:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or above in it, got {requested!r}.")
    return tuple(dict.fromkeys([*real, *virtual]))


def check_match(torch: Torch, toolkit: Toolkit) -> None:
    """Raise for a toolkit too old for the kernels, or of another major version than torch's."""
    if release(toolkit.version) < MINIMUM_TOOLKIT:
        raise BuildError(
            f"expected a CUDA toolkit of 12.1 or newer (kernel parameters above 4 KB), got "
            f"{toolkit.version} ({toolkit.nvcc}); install CUDA 13, or set FORCE_CUDA=0 to build "
            "without the CUDA kernels."
        )
    if torch.cuda is not None and release(torch.cuda)[0] != release(toolkit.version)[0]:
        raise BuildError(
            f"expected the CUDA {torch.cuda} toolkit that torch {torch.version} was built with, "
            f"got CUDA {toolkit.version} ({toolkit.nvcc}); install CUDA {torch.cuda} and name it "
            f"in CUDA_HOME, or install a torch for CUDA {release(toolkit.version)[0]}, or set "
            "FORCE_CUDA=0 to build without the CUDA kernels."
        )


def decide_cuda(
    environ: Mapping[str, str], folders: Sequence[str], torch: Torch, sources: Sequence[str]
) -> Cuda:
    """Decide whether to build the CUDA kernels: where there are sources and a toolkit.

    environ: FORCE_CUDA=0 leaves them out, FORCE_CUDA=1 makes a missing toolkit an error.
    folders: searched for NVIDIA's wheels (`sys.path`). Whether a GPU is visible is never asked.
    """
    forced = environ.get("FORCE_CUDA", "")
    if forced not in ("", "0", "1"):
        raise BuildError(f"FORCE_CUDA: expected 0 or 1, got {forced!r}.")
    if forced == "0":
        return Cuda(None, (), "FORCE_CUDA=0")
    if not sources:
        return Cuda(None, (), "there are no .cu files")
    nvcc = find_nvcc(environ, folders)
    if nvcc is None:
        missing = "no nvcc in CUDA_HOME, CUDA_PATH, on the PATH or in the nvidia wheels"
        if forced == "1":
            wanted = "13" if torch.cuda is None else torch.cuda
            raise BuildError(
                f"FORCE_CUDA=1: expected a CUDA toolkit, got {missing}; install CUDA {wanted} and "
                "name its folder in CUDA_HOME, or unset FORCE_CUDA."
            )
        return Cuda(None, (), missing)
    toolkit = read_toolkit(nvcc)
    check_match(torch, toolkit)
    requested = environ.get("TORCH_CUDA_ARCH_LIST", "")
    architectures = choose_architectures(requested, supported_architectures(toolkit))
    return Cuda(toolkit, architectures, str(toolkit.nvcc))
