"""`train` in two gloo processes: it takes the steps that one process takes with twice the batches.

The processes are started once, do all trainings of train_ranks.py and leave what came of them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_ranks import ALIKE, examples

RANKS = Path(__file__).with_name("train_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes got."""
    paths = [str(RANKS.parent.parent), os.environ.get("PYTHONPATH", "")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), output
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What this process gets by itself."""
    got = {}
    for name, training in ALIKE.items():
        torch.manual_seed(0)
        got[name] = training(tmp_path_factory.mktemp("alone"), 1)
    return got


@pytest.mark.parametrize("name", [*ALIKE])
def test_two_processes_take_the_steps_of_one(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], name: str
) -> None:
    expected = alone[name]
    for rank in ranks:
        for parameter, value in expected["state"].items():
            torch.testing.assert_close(rank[name]["state"][parameter], value, rtol=2e-5, atol=1e-6)
        history = rank[name]["history"]
        assert [entry["step"] for entry in history] == [e["step"] for e in expected["history"]]
        for entry, of_one in zip(history, expected["history"], strict=True):
            shown = {tag for tag in of_one if "_per_second" not in tag}
            assert shown <= entry.keys()
            for tag in shown:
                assert entry[tag] == pytest.approx(of_one[tag], rel=1e-4, abs=1e-6), tag


def test_copies_stay_the_same_to_the_last_bit(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    for name in (*ALIKE, "whole", "resumed", "wrapped"):
        for parameter, value in first[name]["state"].items():
            assert torch.equal(second[name]["state"][parameter], value), (name, parameter)


def test_a_resumed_training_takes_the_same_steps(ranks: list[dict[str, Any]]) -> None:
    """With dropout, whose numbers are each process's own by then, and batch norm."""
    for rank in ranks:
        for parameter, value in rank["whole"]["state"].items():
            assert torch.equal(rank["resumed"]["state"][parameter], value), parameter


def test_rank_0_has_the_run_and_the_checkpoints(ranks: list[dict[str, Any]], folder: Path) -> None:
    run = folder / "whole" / "noisy"
    assert [rank["whole"]["run_dir"] for rank in ranks] == [str(run), str(run / "rank1")]
    assert {rank["whole"]["checkpoint"] for rank in ranks} == {str(run / "checkpoints" / "step-8")}
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == [
        "step-3",
        "step-6",
        "step-8",
    ]
    assert not (run / "rank1" / "checkpoints").exists()
    for place in (run, run / "rank1"):
        lines = (place / "history.jsonl").read_text().splitlines()
        assert max(json.loads(line)["step"] for line in lines) == 8
        assert json.loads((place / "config.json").read_text())["run_name"] == "noisy"


@pytest.mark.parametrize("name", ["seen", "seen by generator"])
@pytest.mark.parametrize("data", ["train", "eval"])
def test_every_example_is_seen_once_an_epoch(
    ranks: list[dict[str, Any]], name: str, data: str
) -> None:
    """Of loaders that shuffle, by random numbers that differ from process to process."""
    first, second = (torch.tensor(rank[name][data]).view(2, 24) for rank in ranks)
    every = examples(48).tensors[0][:, 0].sort().values
    for epoch in range(2):
        assert torch.equal(torch.cat((first[epoch], second[epoch])).sort().values, every)
    assert not torch.equal(first[0], first[1])  # it is shuffled


def test_a_model_and_a_loader_for_several_processes_stay_as_they_are(
    ranks: list[dict[str, Any]],
) -> None:
    got = ranks[0]["wrapped"]
    assert "unused.weight" in got["state"]
    # 24 examples a process, 4 a batch; of one batch the loader of all would have brought 12.
    assert got["history"][-1]["step"] == 12


def test_what_could_not_be_trained_together_is_refused(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    for rank in ranks:
        assert rank["sharded"].startswith("train: expected parameters that each process has whole")
        assert rank["not called"].startswith("train: expected loss_fn to call the model that it is")
    for name in ("sharded", "not called"):
        assert not list(folder.glob(f"{name}/*"))
