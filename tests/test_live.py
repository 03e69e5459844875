"""What is published can be read in the browser within seconds, while the training goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pyvizllm

LIVE_SECONDS = 5.0  # promised; TensorBoard looks at the files once a second


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[pyvizllm.telemetry.Watch, torch.optim.Optimizer]]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, tmp_path, every=1) as watch:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        yield watch, optimizer


def steps_shown(address: str) -> list[int]:
    query = urllib.parse.urlencode({"tag": "train/grad_norm", "run": "."})
    try:
        with urllib.request.urlopen(f"{address}data/plugin/scalars/scalars?{query}") as reply:
            return [step for _, step, _ in json.load(reply)]
    except urllib.error.HTTPError:  # nothing of that name yet
        return []


def seconds_until(address: str, step: int, most: float) -> float:
    begin = time.monotonic()
    while step not in steps_shown(address):
        assert time.monotonic() - begin < most, f"step {step} is not shown"
        time.sleep(0.05)
    return time.monotonic() - begin


def test_a_published_step_is_in_the_browser_within_seconds(run, tmp_path: Path) -> None:
    watch, optimizer = run
    optimizer.step()
    watch.publish()
    assert watch.flush(60)
    command = [sys.executable, "-m", "pyvizllm", "view", str(tmp_path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as viewer:
        try:
            assert viewer.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", viewer.stdout.readline())
            assert found is not None
            seconds_until(found[0], 1, most=120)  # while it starts
            for step in (2, 3):
                optimizer.step()
                watch.publish()  # and nobody waits for the disk
                assert seconds_until(found[0], step, most=60) < LIVE_SECONDS
        finally:
            viewer.terminate()
