"""The command line: what it prints, its exit codes, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

from pyvizllm.cli import main
from pyvizllm.info import version

# Small enough for a test, yet a whole model: 1 block, 2 heads of 8 channels, windows of 16.
SHAPE = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where runs/ would be made, with 7,200 bytes in ../text.txt."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "text.txt").write_text("a loss that falls\n" * 400)
    monkeypatch.chdir(here)
    return here


def run_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is on stderr after a refusal with exit code 2."""
    try:
        code = main(args)
    except SystemExit as exit_:  # tyro's
        code = exit_.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    return err


def test_demo_trains_and_says_where_to_look(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--max-steps", "40"]) == 0
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"train loss (\d+\.\d+) nats", out)]
    evaluation = re.search(r"eval loss +(\d+\.\d+) nats", out)
    assert len(losses) == 2
    assert 2.0 < losses[1] < losses[0] - 0.5
    assert losses[0] < 5.6  # downwards from log(256) = 5.55
    assert evaluation
    assert 2.0 < float(evaluation[1]) < losses[0]
    command = re.search(r"pyvizllm view (\S+)$", out, re.MULTILINE)
    assert command
    run_dir = Path(command[1])
    assert run_dir.parent == Path("runs").absolute()
    assert len(re.findall(r"^  \| ", out, re.MULTILINE)) >= 1  # the sample

    events = EventAccumulator(str(run_dir), size_guidance={"histograms": 0})
    events.Reload()
    scalars = [event.step for event in events.Scalars("train/loss")]
    assert scalars == [20, 40]
    assert events.Scalars("train/loss")[1].value == pytest.approx(losses[1], abs=6e-4)
    histograms = {tag for tag in events.Tags()["histograms"] if tag.startswith("grad/")}
    # 2 embeddings, 4 blocks of 12, the last norm's 2: every parameter, the shared matrix once.
    assert len(histograms) == 2 + 4 * 12 + 2
    assert [event.step for event in events.Histograms("grad/norm.weight")] == [20, 40]


def test_demo_reads_the_data_it_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder.parent / "text.txt"
    assert main(["demo", "--data", str(data), "--max-steps", "2", "--output-dir", "x y"]) == 0
    out = capsys.readouterr().out
    assert f"learns from 6,480 bytes of {data}" in out  # 7,200 less the tenth for evaluation
    assert f"pyvizllm view '{folder / 'x y'}/" in out  # quoted for the shell
    assert [path.name for path in folder.iterdir()] == ["x y"]


def test_train_takes_every_option_of_train_config(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run-name", "mine", "--max-steps", "3", "--logging-steps", "1", "--optim", "sgd"]
    options += ["--learning-rate", "0.25", "--no-telemetry", "--disable-tqdm", "--seed", "7"]
    data = ["--data", str(folder.parent / "text.txt")]
    assert main(["train", *data, *SHAPE, *options]) == 0
    assert "train loss" in capsys.readouterr().out
    config = json.loads((folder / "runs" / "mine" / "config.json").read_text())
    chosen = {"optim": "sgd", "learning_rate": 0.25, "seed": 7, "telemetry": False}
    assert {name: config[name] for name in chosen} == chosen
    events = EventAccumulator(str(folder / "runs" / "mine"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Tags()["histograms"] == []


def test_the_same_seed_gives_the_same_losses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(seed: str) -> list[str]:
        data = ["--data", str(folder.parent / "text.txt"), *SHAPE]
        assert main(["train", *data, "--max-steps", "3", "--seed", seed]) == 0
        out = capsys.readouterr().out
        return [line for line in out.splitlines() if "runs" not in line]

    assert lines("1") == lines("1")
    assert lines("1") != lines("2")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("train --data none", "expected a text file or a folder, got none, which does not exist"),
        ("demo --data none", "expected a text file or a folder, got none, which does not exist"),
        ("demo --data ../text.txt --max-steps 0", "expected max_steps at least 1"),
        ("train --data ../text.txt --block-size 9999", "expected at least 100000 bytes of text"),
        ("train --data ../text.txt --n-head 5", "n_embd 128 and n_head 5"),
        ("train --data ../text.txt --learning-rate -1", "expected learning_rate at least 0"),
        ("train --data ../text.txt --eval-windows 0", "expected eval_windows at least 1, got 0"),
        ("view none", "expected the folder of a run, got none, which is none"),
        ("view .", "expected the folder of a run, got ., without events"),
    ],
)
def test_a_user_error_is_one_sentence_and_leaves_nothing(
    folder: Path, args: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = run_error(args.split(), capsys)
    assert error.startswith("pyvizllm: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("demo --nope", "Unrecognized options: --nope"),
        ("demo --max-steps few", "invalid literal for int() with base 10: 'few'"),
        ("train", "--data PATH"),
        ("train --data ../text.txt --optim lion", "lion"),
        ("paint", "Unrecognized options: paint"),
        ("", "Expected one of {demo, train, view, doctor, report, info}"),
    ],
)
def test_an_unknown_option_is_refused(
    folder: Path, args: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in run_error(args.split(), capsys)
    assert list(folder.iterdir()) == []


def test_a_run_folder_that_cannot_be_written_is_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the folder should be: also refused where the tests run as root."""
    (folder / "taken").write_text("mine")
    args = ["train", "--data", "../text.txt", *SHAPE, "--output-dir", "taken", "--max-steps", "1"]
    code = main(args)
    assert code == 2
    assert "expected output_dir to be a folder that can be written" in capsys.readouterr().err
    assert (folder / "taken").read_text() == "mine"


def test_python_m_pyvizllm_is_the_same_command(folder: Path) -> None:
    command = [sys.executable, "-m", "pyvizllm", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert "usage: pyvizllm" in result.stdout
    for name in ("demo", "train", "view", "info"):
        assert re.search(rf"• {name} +[A-Z]", result.stdout), name  # each with what it does


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyvizllm {version()}\n"


def test_info_prints_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "cross_entropy" in out


def environment() -> dict[str, str]:
    """For a child in another directory: the package as this process sees it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def events(tmp_path: Path) -> Path:
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_scalar("train/loss", 1.5, 1)
    return tmp_path / "run"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_view_serves_the_run_until_it_is_stopped(events: Path, stop: int, code: int) -> None:
    command = [sys.executable, "-m", "pyvizllm", "view", str(events)]
    viewer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert viewer.stdout
    with viewer:
        line = viewer.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line
        with urllib.request.urlopen(found[0] + "data/plugins_listing", timeout=60) as reply:
            assert json.load(reply)["scalars"]["enabled"]
        viewer.send_signal(stop)
        assert viewer.wait(timeout=60) == code
    with socket.socket() as probe:  # nothing is left listening
        assert probe.connect_ex(("127.0.0.1", int(found[1]))) != 0


def test_view_refuses_a_taken_or_impossible_port(
    events: Path, taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    error = run_error(["view", str(events), "--port", str(taken_port)], capsys)
    assert f"view: expected a free port, got {taken_port}" in error
    error = run_error(["view", str(events), "--port", "70000"], capsys)
    assert "view: expected a port from 1 to 65535, got 70000" in error


def test_view_takes_another_port_when_its_own_is_taken(
    taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyvizllm import view

    monkeypatch.setattr(view, "DEFAULT_PORT", taken_port)
    assert view._choose_port(None) not in (taken_port, 0)


def test_view_says_why_tensorboard_ended(
    events: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyvizllm import view

    script = "import sys; print('no such plugin', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(view, "_command", lambda run_dir, port: [sys.executable, "-c", script])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    error = run_error(["view", str(events)], capsys)
    assert error == "pyvizllm: view: TensorBoard ended with code 3:\nno such plugin\n"
