"""`doctor` and `report` on files that are no history, or one of extremes: a sentence or a page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvizllm.cli import main

OTHER_JSON: dict[str, str] = {
    "list": "[1, 2]",
    "number": "5",
    "no step": '{"scalars": {"a": 1}}',
    "step of true": '{"step": true}',
    "step of 400 digits": f'{{"step": 1{"0" * 400}}}',
    "deep": "[" * 100_000,
    "scalars of null": '{"step": 1, "scalars": null}',
    "scalars of a list": '{"step": 1, "scalars": [1]}',
    "value of null": '{"step": 1, "scalars": {"train/loss": null}}',
    "value of a word": '{"step": 1, "scalars": {"train/loss": "x"}}',
    "time of null": '{"step": 1, "wall_time": null}',
    "finding of a word": '{"step": 1, "findings": ["x"]}',
    "findings of null": '{"step": 1, "findings": null}',
    "finding's step of null": '{"step": 1, "findings": [{"rule": "a", "step": null}]}',
    "evidence of a list": '{"step": 1, "findings": [{"rule": "a", "evidence": [1]}]}',
    "array of null": '{"step": 1, "arrays": {"trajectory/point": null}}',
    "text of a number": '{"step": 1, "texts": {"config": 5}}',
}


@pytest.mark.parametrize("command", ["doctor", "report"])
@pytest.mark.parametrize("name", OTHER_JSON)
def test_json_of_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    text = OTHER_JSON[name]
    (tmp_path / "history.jsonl").write_text('{"step": 0, "scalars": {"train/loss": 1}}\n' + text)
    assert main([command, str(tmp_path)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("pyvizllm: read_history: expected lines of a run's history in ")
    assert told.endswith(f"got {text[:60]}")


def test_a_configuration_of_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1, "scalars": {"train/loss": 1}}\n')
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert main(["report", str(tmp_path)]) == 0
    assert "[" * 100_000 in (tmp_path / "report.html").read_text()


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    """In a process of its own: pytest's stdout takes anything."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    (folder / "history.jsonl").write_text('{"step": 1, "scalars": {"train/loss": 1}}\n')
    for command, told in (("report", "report.html"), ("doctor", "Nothing is wrong")):
        arguments = [sys.executable, "-m", "pyvizllm", command, os.fsencode(folder)]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "run\\udcff" in done.stdout
        assert told in done.stdout
    assert "<title>run?</title>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("where", ["message", "advice", "rule"])
def test_nothing_of_a_run_reaches_the_terminal_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    finding = {"rule": "a", "message": "m", where: "\x1b[2J\x9b31mé\u202e"}
    line = {"step": 1, "scalars": {"train/loss": 1.0}, "findings": [finding]}
    (tmp_path / "history.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["doctor", str(tmp_path)]) in (0, 1)
    out = capsys.readouterr().out
    assert r"\x1b[2J\x9b31mé\u202e" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n["\x9b2J"]\n')
    assert main(["doctor", str(tmp_path)]) == 2
    assert r'got ["\x9b2J"]' in capsys.readouterr().err


def test_a_folder_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "history.jsonl").mkdir()
    assert main(["doctor", str(tmp_path)]) == 2
    assert "expected the folder of a run with history.jsonl" in capsys.readouterr().err


def lines(values: list[Any], **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "wall_time": 1.0, "scalars": {"train/loss": value}, **more}
        for step, value in enumerate(values)
    ]


POINT = "trajectory/point"
EXTREMES: dict[str, list[dict[str, Any]]] = {
    "as far apart as can be": lines([1.5e308, -1.5e308] * 10),
    "subnormal": lines([0.0, 5e-324] * 10),
    "neighbours": lines([1e16, 1e16 + 2] * 10),
    "no number": lines(["NaN", "Infinity"] * 10),
    "a year that no calendar has": lines([1.0], wall_time=1e300),
    "path through nowhere": lines([1.0] * 5, arrays={POINT: ["NaN"] * 64}),
    "path through infinity": lines([1.0] * 5, arrays={POINT: [1e300, -1e300] * 32}),
    "path of another size": lines([1.0] * 5, arrays={POINT: [1.0, 2.0]}),
    "half a character": lines([1.0], findings=[{"rule": "\ud800", "message": "\udfff"}]),
    "an unknown severity": lines([1.0], findings=[{"rule": "a", "severity": ["x"]}]),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = "".join(json.dumps(line) + "\n" for line in EXTREMES[name])
    (tmp_path / "history.jsonl").write_text(text)
    assert main(["doctor", str(tmp_path), "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["summary"]["steps"] == len(EXTREMES[name]) - 1
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawings = re.findall("<svg.*?</svg>", page)
    assert drawings
    assert not any("nan" in drawing or "inf" in drawing for drawing in drawings)
    assert "Path of the parameters" not in page
