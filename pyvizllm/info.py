"""What is installed, what it was built for, and what of it runs on this machine."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from pyvizllm.ops import _extension  # noqa: F401  registers the operations listed here

DEVICES = ("CPU", "CUDA")


def build_config() -> dict[str, Any]:
    """Return what setup.py decided: torch, compiler, cpu_capabilities, cuda, cuda_architectures."""
    config: dict[str, Any] = json.loads(Path(__file__).with_name("_build_config.json").read_text())
    return config


def kernels() -> dict[str, tuple[str, ...]]:
    """Return the devices each operation has a kernel for: {"cross_entropy": ("CPU", "CUDA")}.

    Asked of torch's dispatcher. Operations without a kernel of their own are left out.
    """
    found = {}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if not name.startswith("pyvizllm::"):
            continue
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        devices = tuple(device for device in DEVICES if has(name, device))
        if devices:
            found[name.removeprefix("pyvizllm::")] = devices
    return found


def version() -> str:
    """Return the installed version; a source tree on the path alone has none."""
    try:
        return importlib.metadata.version("pyvizllm")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree, not installed)"


def gpus() -> list[str]:
    """Return the GPUs torch can use, as ["NVIDIA H100 (sm_90)"]."""
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return names


def describe() -> str:
    """Return the whole page that `pyvizllm info` prints."""
    config = build_config()
    capability: str = torch.ops.pyvizllm.cpu_capability()
    cuda = f"none ({config['cuda_reason']})"
    if config["cuda"] is not None:
        cuda = f"CUDA {config['cuda']}: {' '.join(config['cuda_architectures'])}"
    torch_cuda = torch.version.cuda
    rows = [
        ("pyvizllm", f"{version()} in {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()} on {platform.machine()}"),
        ("torch", f"{torch.__version__}, {f'CUDA {torch_cuda}' if torch_cuda else 'CPU build'}"),
        ("GPU", ", ".join(gpus()) or "none that torch can use"),
        ("built with", f"torch {config['torch']}, {config['compiler']}"),
        ("CPU kernels", f"{' '.join(config['cpu_capabilities'])}; in use: {capability}"),
        ("CUDA kernels", cuda),
    ]
    rows += [(name, " ".join(devices)) for name, devices in kernels().items()]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
