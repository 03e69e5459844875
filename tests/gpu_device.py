"""The device of the tests and benchmarks marked gpu, and the reason to skip them.

PYVIZLLM_GPU_DEVICE=cpu runs those of them that use nothing of CUDA's own on the CPU, the benchmarks
on tiny inputs: to try a new one on a machine without a GPU. Nothing they time there means anything.
"""

from __future__ import annotations

import os

import pytest
import torch

from pyvizllm import info

DEVICE = os.environ.get("PYVIZLLM_GPU_DEVICE", "cuda")


def why_not(device: str) -> str:
    """Why the tests cannot run on this machine, or ""."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "expected a CUDA device, got none"
    if "CUDA" not in info.kernels()["tensor_stats"]:
        return "expected a build with CUDA kernels, got one without (make gpu-check makes it)"
    return ""


_reason = why_not(DEVICE)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(_reason), reason=_reason)]
"""The marks of a whole file: `pytestmark = on_gpu`."""

cuda_only = pytest.mark.skipif(DEVICE != "cuda", reason="uses CUDA's own interfaces")
