"""Which run `doctor` and `report` read: a folder, its history, or the only one in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvizllm.cli import main
from pyvizllm.run_history import find_history


def make_run(folder: Path, when: float) -> Path:
    folder.mkdir(parents=True)
    history = folder / "history.jsonl"
    history.write_text('{"step": 1, "scalars": {"train/loss": 1}}\n')
    os.utime(history, (when, when))
    return history


@pytest.mark.parametrize("command", ["doctor", "report"])
@pytest.mark.parametrize("given", ["runs/a", "runs/a/history.jsonl", "runs"])
def test_what_names_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, given: str
) -> None:
    history = make_run(tmp_path / "runs" / "a", 1.0)
    make_run(tmp_path / "runs" / "a" / "rank1", 2.0)  # of the same training
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("none")
    assert find_history(tmp_path / given, command) == history
    assert main([command, str(tmp_path / given)]) == 0
    out = capsys.readouterr().out
    if command == "report":
        assert out == f"{history.with_name('report.html')}\n"
        assert "<title>a</title>" in history.with_name("report.html").read_text()
    else:
        shown = history if given.endswith("jsonl") else history.parent
        assert out.startswith(f"{shown}: 1 steps, train loss 1 ")


@pytest.mark.parametrize("command", ["doctor", "report"])
def test_several_runs_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name, when in (("b", 20.0), ("a", 30.0), ("c", 10.0)):
        make_run(tmp_path / name, when)
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"pyvizllm: {command}: expected the folder of one run, got {tmp_path} with 3, the newest "
        f"first: {tmp_path / 'a'}, {tmp_path / 'b'}, {tmp_path / 'c'}\n"
    )
    for i in range(9):
        make_run(tmp_path / f"old{i}", float(-i))
    with pytest.raises(ValueError, match=r"with 12, .*/a, .*old6 and 2 older ones$"):
        find_history(tmp_path, command)


@pytest.mark.parametrize("command", ["doctor", "report"])
def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "none"):
        assert main([command, str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"pyvizllm: {command}: expected the folder of a run with history.jsonl, got {folder}\n"
        )
