"""What telemetry costs: the demo's training with every gradient watched, against without.

60 steps of the demo's GPT and batch, with the demo's three publications of all histograms.
"""

from __future__ import annotations

import dataclasses

import torch

from pyvizllm import train
from pyvizllm.cli import Demo, Shape, demo_config
from pyvizllm.training.text import TextDataset

STEPS = 60


def test_telemetry_on_against_off(compare, tmp_path):
    torch.manual_seed(0)
    model = Shape().build()
    text = TextDataset(block_size=model.config.block_size, split="train")

    def run(telemetry: bool) -> None:
        config = dataclasses.replace(
            demo_config(Demo(output_dir=str(tmp_path), max_steps=STEPS, telemetry=telemetry)),
            save_steps=0,
            disable_tqdm=True,
        )
        train(model, text, config=config)

    compare(
        f"demo training, {STEPS} steps",
        ("telemetry on", lambda: run(True)),
        {"telemetry off": lambda: run(False)},
        rounds=9,
        target={"telemetry off": "within 3 % (0.97x)"},
    )
