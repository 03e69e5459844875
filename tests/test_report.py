"""The page of a run: what is on it, that nothing on it is markup of others, and its size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pyvizllm.cli import main
from pyvizllm.report import render
from pyvizllm.report.charts import Series, line_chart, thinned

FINDING = {
    "rule": "loss_spike",
    "severity": "serious",
    "step": 30,
    "message": "<loss> rose & rose",
    "advice": "Lower the 'learning rate'.",
    "evidence": {"z": 12.0},
}


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps({"wall_time": 1.7e9 + line["step"], **line}) + "\n" for line in lines)
    (folder / "history.jsonl").write_text(text)


def run(steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        scalars: dict[str, Any] = {"train/loss": 4.0 / step, "train/grad_norm": 10.0**-step}
        scalars |= {f"layer_grad_norm/h.{i}": 1.0 + i for i in range(12)}
        if step % 5 == 0:
            scalars["eval/loss"] = 5.0 / step
        point = [float(step), float(step**2)] + [0.0] * 62
        lines.append({"step": step, "scalars": scalars, "arrays": {"trajectory/point": point}})
    return lines


def figures(page: str) -> list[str]:
    return re.findall(r'aria-label="([^"]*)"', page) + re.findall(r'<img [^>]*alt="([^"]*)"', page)


def test_what_is_on_the_page(tmp_path: Path) -> None:
    lines = run(40)
    lines[29]["findings"] = [FINDING]
    lines[0]["texts"] = {"config": '    {"lr": 1, "name": "</pre><script>"}'}
    write(tmp_path, lines)
    page = render(tmp_path)
    assert {"Loss", "Gradient norm", "Gradient norm by layer"} <= set(figures(page))
    assert "Gradient norm of layers over the steps" in figures(page)
    assert "Path of the parameters on its principal axes" in figures(page)
    assert "Accuracy" not in figures(page)  # there was none
    assert "&lt;loss&gt; rose &amp; rose." in page
    assert "Lower the &#x27;learning rate&#x27;." in page
    assert "<script" not in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page
    assert not re.search(r"(src|href)=.?(https?:)?//", page)  # asks for nothing


def test_every_chart_is_well_formed_and_within_its_frame(tmp_path: Path) -> None:
    write(tmp_path, run(40))
    charts = re.findall(r"<svg.*?</svg>", render(tmp_path), re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        for line in ElementTree.fromstring(chart).iter("polyline"):
            points = np.array([p.split(",") for p in line.attrib["points"].split()], dtype=float)
            assert ((points >= 0) & (points <= (480, 270))).all()


def test_points_of_a_chart() -> None:
    """The axis spans the values: the first point at the left and the top, the last one opposite."""
    chart = line_chart("t", {"a": Series(np.array([10.0, 20.0]), np.array([3.0, 1.0]))})
    (line,) = ElementTree.fromstring(re.findall(r"<svg.*</svg>", chart)[0]).iter("polyline")
    assert line.attrib["points"] == "52.0,30.0 468.0,244.0"
    log = line_chart("t", {"a": Series(np.arange(3.0), np.array([1.0, 10.0, 100.0]))}, log=True)
    (line,) = ElementTree.fromstring(re.findall(r"<svg.*</svg>", log)[0]).iter("polyline")
    assert line.attrib["points"] == "52.0,244.0 260.0,137.0 468.0,30.0"
    assert re.findall(r'class="tick end">([^<]*)<', log)[:3] == ["1", "10", "100"]


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 200_000),
        (100_000, 300_000),
        (1_000_000, 1_002_000),
        (0, 2.5e-4),
        (1.2e-4, 2.1e-4),
        (1000, 1000.5),
        (99_998, 100_002),
        (-3e-7, 2e-7),
        (0.1, 0.7),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_labels_of_an_axis_are_the_numbers_of_their_places(
    low: float, high: float, log: bool
) -> None:
    if log and low <= 0:
        low = high / 40
    ends = np.array([low, high], np.float64)
    chart = line_chart("t", {"a": Series(ends, ends)}, log=log)
    axes = {"y": ("end", 244.0, 30.0), "x": ("", 52.0, 468.0)}
    for axis, (kind, begin, end) in axes.items():
        if axis == "x" and high - low < 1:
            continue  # of steps, which are whole
        ticks = [
            (float(text.attrib[axis]) - (4 if axis == "y" else 0), text.text or "")
            for text in ElementTree.fromstring(re.findall("<svg.*</svg>", chart)[0]).iter("text")
            if text.attrib["class"].startswith("tick") and (text.attrib["x"] == "46") == bool(kind)
        ]
        assert len({text for _, text in ticks}) == len(ticks) >= 2
        for place, text in ticks:
            share = (place - begin) / (end - begin)
            value = low + share * (high - low)
            if log and axis == "y":
                value = low * (high / low) ** share
            assert float(text.replace(",", "")) == pytest.approx(value, abs=0.01 * (high - low))


def test_labels_are_short() -> None:
    ends = np.array([0.0, 250_000.0])
    chart = line_chart("t", {"a": Series(ends, ends)})
    assert re.findall(r'class="tick end">([^<]*)<', chart) == [
        *("0", "50,000", "1e5", "1.5e5", "2e5", "2.5e5"),
    ]


def test_nothing_finite_is_no_chart() -> None:
    values = np.array([np.nan, np.inf])
    assert line_chart("t", {"a": Series(np.arange(2.0), values)}) == ""
    assert line_chart("t", {"a": Series(np.arange(2.0), -np.ones(2))}, log=True) == ""
    assert "circle" in line_chart("t", {"a": Series(np.ones(1), np.ones(1))})


def test_thinning_keeps_the_extremes() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=100_000)
    values[[777, 54_321]] = 50.0, -50.0
    values[3] = np.nan
    thin = thinned(Series(np.arange(100_000.0), values))
    assert len(thin.values) <= 480
    assert (thin.values.max(), thin.values.min()) == (50.0, -50.0)
    assert (np.diff(thin.steps) > 0).all()


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = [
        {
            "step": step,
            "scalars": {"train/loss": x, "layer_grad_norm/a": abs(x), "pyvizllm/publish_every": 1},
        }
        for step, x in enumerate(generator.normal(size=20_000).tolist(), start=1)
    ]
    write(tmp_path, lines)
    assert len(render(tmp_path)) < 200_000


def test_torn_and_odd_histories(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 1, "scalars": {"train/loss": "NaN", "train/grad_norm": "Infinity"}}])
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 2, "scal')
    page = render(tmp_path)
    assert "the loss was nan" in page
    assert figures(page) == []

    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected a history with publications, got none"):
        render(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, run(5))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text() == render(tmp_path)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").is_file()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "report: expected the folder of a run with history.jsonl" in capsys.readouterr().err
