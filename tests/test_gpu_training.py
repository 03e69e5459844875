"""A small training on a GPU: its statistics reach the history through pinned copies."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_device import DEVICE, cuda_only, on_gpu

import pyvizllm

pytest.importorskip("tensorboardX", reason="training needs tensorboardX, which is not installed")
pytestmark = on_gpu


def trained(device: str, folder) -> pyvizllm.TrainResult:
    torch.manual_seed(3)
    inputs = torch.randn(64, 8)
    targets = (inputs @ torch.randn(8, 4)).argmax(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    return pyvizllm.train(
        model,
        torch.utils.data.TensorDataset(inputs, targets),
        device=device,
        output_dir=str(folder),
        max_steps=30,
        learning_rate=1e-2,
        logging_steps=5,
        disable_tqdm=True,
    )


def test_a_training_is_the_cpus(tmp_path):
    on_gpu, on_cpu = trained(DEVICE, tmp_path / "gpu"), trained("cpu", tmp_path / "cpu")
    rows = [row for row in on_gpu.history if "train/loss" in row]
    wanted = [row for row in on_cpu.history if "train/loss" in row]
    assert len(rows) == len(wanted) == 6
    for row, other in zip(rows, wanted, strict=True):
        for tag in ("train/loss", "train/grad_norm"):
            assert math.isclose(row[tag], other[tag], rel_tol=1e-3), tag
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@cuda_only
def test_watching_a_training_gives_the_same_weights(tmp_path):
    """Telemetry only reads: with it and without, the losses are the same bits."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 8), torch.randint(4, (64,))
    losses = []
    for telemetry in (True, False):
        torch.manual_seed(1)
        result = pyvizllm.train(
            torch.nn.Linear(8, 4),
            torch.utils.data.TensorDataset(inputs, targets),
            device=DEVICE,
            output_dir=str(tmp_path / str(telemetry)),
            max_steps=20,
            logging_steps=20,
            telemetry=telemetry,
            disable_tqdm=True,
        )
        losses.append([row["train/loss"] for row in result.history if "train/loss" in row])
    assert losses[0] == losses[1]
