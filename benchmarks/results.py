"""Results files: the machine, what was compared, and how each stage of a GPU check went."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from comparison import Comparison

FOLDER = Path(os.environ.get("GPU_CHECK_OUT") or Path(__file__).parent / "results")


def cpu_machine() -> dict[str, Any]:
    """The processor, and what ran on it."""
    from pyvizllm import info

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.ops.pyvizllm.cpu_capability(),
        **_versions(),
        "pyvizllm": info.version(),
    }


def gpu_machine() -> dict[str, Any] | None:
    """The first GPU, and what would run on it; None where torch sees none. Needs no pyvizllm."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "l2_mb": properties.L2_cache_size / 2**20,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        **_versions(),
        "liger_kernel": installed("liger-kernel"),
        "tensorboardX": installed("tensorboardX"),
    }


def installed(package: str) -> str:
    """The version of a package that a comparison would use."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def today() -> str:
    return datetime.date.today().isoformat()


def path_of(machine: dict[str, Any], date: str) -> Path:
    """Where the results of a machine and a day are kept: nvidia-h100-80gb-hbm3-2026-01-31.json."""
    name = machine.get("gpu") or machine["processor"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return FOLDER / f"{slug}-{date}.json"


def result_of(
    command: str, machine: dict[str, Any], comparisons: Iterable[Comparison]
) -> dict[str, Any]:
    return {
        "command": command,
        "date": today(),
        "machine": machine,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def write(result: dict[str, Any]) -> Path:
    path = path_of(result["machine"], result["date"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
