"""The folder of a watched run: resumed, shared by ranks, left by its training, never begun."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import pyvizllm
from pyvizllm.telemetry import HistorySink, read_history


def train(logdir: Path, steps: range, *, nan: bool = False) -> Path:
    """Each step's loss is its number; returns the watch's own folder."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, logdir, every=2, start_step=steps.start - 1) as watch:
        for step in steps:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan if nan else 1.0)
            optimizer.step()
            watch.log(loss=float(step))
        assert watch.logdir is not None
        return watch.logdir


def shown(folder: Path) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


def test_a_training_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, range(1, 11))
    train(tmp_path, range(5, 9))
    expected = [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5)]
    assert shown(tmp_path) == expected
    server = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in server.Tensors("train/loss")] == [2, 4, 6, 8]
    history = read_history(tmp_path / "history.jsonl")
    assert [(e["step"], e["scalars"]["train/loss"]) for e in history] == expected


@pytest.mark.parametrize("said_by", ["RANK", "torch.distributed"])
def test_each_rank_has_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said_by: str
) -> None:
    for rank in range(3):
        if said_by == "RANK":
            monkeypatch.setenv("RANK", str(rank))
        else:
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        train(tmp_path, range(1 + rank, 5 + rank), nan=True)
    for rank, folder in enumerate((tmp_path, tmp_path / "rank1", tmp_path / "rank2")):
        expected = {0: [(2, 1.5), (4, 3.5)], 1: [(2, 2.0), (4, 3.5), (5, 5.0)]}.get(
            rank, [(4, 3.5), (6, 5.5)]
        )
        entries = read_history(folder / "history.jsonl")
        assert [(e["step"], e["scalars"]["train/loss"]) for e in entries] == expected
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        assert len(list((folder / "flight").iterdir())) == 1
    assert shown(tmp_path) == [(2, 1.5), (4, 3.5)]


def test_a_rank_that_is_no_number_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "first")
    assert train(tmp_path, range(1, 2)) == tmp_path


def test_the_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, "run", every=1) as watch:
        os.chdir("elsewhere")
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        optimizer.step()
    assert watch.logdir == tmp_path / "run"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert [path.name for path in (tmp_path / "run" / "flight").iterdir()] == [
        "step-1-non_finite.npz"
    ]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("failure", ["history is a folder", "within Watch"])
def test_a_watch_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = tmp_path / "runs" / "a"
    if failure == "history is a folder":
        (run / "history.jsonl").mkdir(parents=True)
    if failure == "within Watch":
        monkeypatch.setattr("pyvizllm.telemetry.optimizer_blocks.Block", lambda *_: 1 / 0)
    before = sorted(tmp_path.rglob("*")), threading.active_count(), open_files()
    with pytest.raises((OSError, ZeroDivisionError)):
        pyvizllm.watch(model, optimizer, run, config={"a": 1})
    assert (sorted(tmp_path.rglob("*")), threading.active_count(), open_files()) == before


def test_a_watch_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, range(1, 5))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("pyvizllm.telemetry.optimizer_blocks.Block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, range(5, 7))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_hyper_parameters_of_any_text_switch_nothing_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, memory = nn.Linear(3, 2), HistorySink()
    hparams = {"data/\udcff.txt": "\udcff.txt", "seed": 2**70}
    watch = pyvizllm.watch(model, None, tmp_path, hparams=hparams, sinks=[memory])
    watch.log({"eval/loss": 2.0})
    watch.close()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in board.Scalars("eval/loss")] == [2.0]
    assert b"?.txt" in board.summary_metadata["_hparams_/session_start_info"].SerializeToString()
    assert not caplog.records


def test_a_model_that_begins_on_the_meta_device_is_watched(tmp_path: Path) -> None:
    """Where another process has the first layers; the optimizer has what is here."""
    model = nn.Sequential(nn.Linear(4, 3, device="meta"), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, tmp_path, every=1) as watch:
        for _ in range(2):
            model[1](torch.ones(2, 3)).sum().backward()
            optimizer.step()
            watch.log(loss=1.0)
    scalars = [entry["scalars"] for entry in read_history(tmp_path / "history.jsonl")]
    assert len(scalars) == 2
    assert all(values["grad_norm/1.weight"] > 0 for values in scalars)
