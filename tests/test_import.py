"""The operations need torch alone; what training needs more, it asks for in a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pyvizllm

ROOT = Path(__file__).resolve().parents[1]

WITHOUT = """
import sys
for name in ("tensorboardX", "tensorboard", "tyro", "crc32c"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import torch, pyvizllm
"""


def run_without_telemetrys_packages(script: str) -> str:
    command = [sys.executable, "-c", WITHOUT + script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_operations_work_without_tensorboardx_tyro_and_crc32c() -> None:
    script = """
x = torch.zeros(3, 4, requires_grad=True)
pyvizllm.cross_entropy(x, torch.tensor([0, 1, 2])).backward()
print(x.grad[0, 0].item(), pyvizllm.tensor_stats([x.grad]).histogram.sum().item())
"""
    assert run_without_telemetrys_packages(script) == "-0.25 12\n"


def test_training_without_tensorboardx_says_what_to_install() -> None:
    script = """
for use in ("pyvizllm.train", "pyvizllm.TrainConfig"):
    try:
        eval(use)
    except ImportError as error:
        print(error)
"""
    lines = run_without_telemetrys_packages(script).splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "pyvizllm.train: expected tensorboardX to be installed, got none",
        "pyvizllm.TrainConfig: expected tensorboardX to be installed, got none",
    ]


def test_every_public_name_is_there() -> None:
    for name in pyvizllm.__all__:
        assert getattr(pyvizllm, name).__module__.startswith("pyvizllm.")
    modules = ["info", "nn", "ops", "optim"]  # those that every import of the package makes
    assert {*pyvizllm.__all__, "__version__", *modules} <= set(dir(pyvizllm))
    for name in set(dir(pyvizllm)) - {*pyvizllm.__all__, "__version__"}:
        assert not name.startswith("_")
        assert getattr(pyvizllm, name).__name__ == f"pyvizllm.{name}"
    with pytest.raises(AttributeError, match="module 'pyvizllm' has no attribute 'trian'"):
        pyvizllm.trian  # noqa: B018
