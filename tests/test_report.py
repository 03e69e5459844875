"""The page of a run: what is on it, that nothing on it is markup of others, and its size."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pyvizllm.cli import main
from pyvizllm.report import render
from pyvizllm.report.charts import Series, line_chart, thinned
from pyvizllm.telemetry.heatmap import MISSING, NOT_FINITE, colours

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
    assert "Gradient norm by layer over the steps" in figures(page)
    assert "Path of the parameters on its principal axes" in figures(page)
    assert "Accuracy" not in figures(page)  # there was none
    assert (  # first what is wrong, then what to do
        "<strong>&lt;loss&gt; rose &amp; rose.</strong><p>Lower the &#x27;learning rate&#x27;.</p>"
    ) in page
    assert "<script" not in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page
    assert not re.search(r"(src|href)=.?(https?:)?//", page)  # asks for nothing


def test_the_worst_finding_comes_first(tmp_path: Path) -> None:
    lines = run(3)
    for line, severity in zip(lines, ("info", "warning", "serious"), strict=True):
        line["findings"] = [{**FINDING, "severity": severity, "advice": ""}]
    write(tmp_path, lines)
    page = render(tmp_path)
    assert re.findall(r'<li class="(\w+)">', page) == ["serious", "warning", "info"]
    assert "<p></p>" not in page  # no advice


@pytest.mark.parametrize(
    ("first", "title"), [(0, "seconds"), (1000, "seconds, from step 1,000 on")]
)
def test_the_time_is_that_of_the_steps_it_is_said_of(
    tmp_path: Path, first: int, title: str
) -> None:
    lines = [
        {"step": first + i, "scalars": {"train/loss": 1.0}, "wall_time": 1e9 + 0.36 * i}
        for i in (0, 1)
    ]
    write(tmp_path, lines)
    assert f"<dt>{title}</dt><dd>0.36</dd>" in render(tmp_path)


def test_every_chart_is_well_formed_and_within_its_frame(tmp_path: Path) -> None:
    write(tmp_path, run(40))
    charts = re.findall(r"<svg.*?</svg>", render(tmp_path), re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        frame = [int(side) for side in ElementTree.fromstring(chart).attrib["viewBox"].split()[2:]]
        for line in ElementTree.fromstring(chart).iter("polyline"):
            points = np.array([p.split(",") for p in line.attrib["points"].split()], dtype=float)
            assert ((points >= 0) & (points <= frame)).all()


def test_points_of_a_chart() -> None:
    """The axis spans the values: the first point at the left and the top, the last one opposite."""
    chart = line_chart("t", {"a": Series(np.array([10.0, 20.0]), np.array([3.0, 1.0]))})
    (line,) = ElementTree.fromstring(re.findall(r"<svg.*</svg>", chart)[0]).iter("polyline")
    assert line.attrib["points"] == "52.0,30.0 468.0,244.0"
    log = line_chart("t", {"a": Series(np.arange(3.0), np.array([1.0, 10.0, 100.0]))}, log=True)
    (line,) = ElementTree.fromstring(re.findall(r"<svg.*</svg>", log)[0]).iter("polyline")
    assert line.attrib["points"] == "52.0,244.0 260.0,137.0 468.0,30.0"
    ticks = re.findall(r'class="tick end">([^<]*)<', log)[:7]
    assert ticks == ["1", "2", "5", "10", "20", "50", "100"]


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


@pytest.mark.parametrize(
    ("high", "values", "last_step"),
    [
        (250_000.0, ["0", "5e4", "1e5", "1.5e5", "2e5", "2.5e5"], "200,000"),
        (1500.0, ["0", "500", "1,000", "1,500"], "1,500"),
        (0.002, ["0", "0.0005", "0.001", "0.0015", "0.002"], "1"),
        (0.0003, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e-4", "3e-4"], "1"),
    ],
)
def test_labels_of_an_axis_are_short_and_written_in_one_way(
    high: float, values: list[str], last_step: str
) -> None:
    ends = np.array([0.0, high])
    chart = line_chart("t", {"a": Series(ends, ends)})
    assert re.findall(r'x="46" y="[^"]*" class="tick end">([^<]*)<', chart) == values
    assert re.findall(r'y="262" class="tick \w+">([^<]*)<', chart)[-1] == last_step


def test_titles_fit_their_charts(tmp_path: Path) -> None:
    families = ("layer_grad_norm", "layer_update_ratio", "moved")
    tags = [f"{family}/{layer}" for family in families for layer in range(999)]
    write(tmp_path, [{"step": step, "scalars": dict.fromkeys(tags, 1.0)} for step in (1, 2)])
    titles = re.findall(r'class="title">([^<]*)<', render(tmp_path))
    assert "Relative change by layer (24 of 999)" in titles
    assert max(map(len, titles)) <= 50  # of at most 8.3 pixels, between 52 and 468


def drawing(chart: str) -> ElementTree.Element:
    (svg,) = re.findall("<svg.*</svg>", chart)
    return ElementTree.fromstring(svg)


def bands(chart: str) -> list[float]:
    """Where each band begins and ends."""
    found = [rect.attrib for rect in drawing(chart).iter("rect")]
    assert all(rect["class"] == "broken" for rect in found)
    return [
        edge
        for rect in found
        for edge in (float(rect["x"]), float(rect["x"]) + float(rect["width"]))
    ]


def legend_text(chart: str) -> str:
    (caption,) = re.findall("<figcaption.*</figcaption>", chart)
    return re.sub("<[^>]*>", "", caption)


def legend(chart: str) -> list[str]:
    return re.findall(r"</i>([^<]*)<", chart)


def test_what_belongs_together_stands_together(tmp_path: Path) -> None:
    lines = run(4)
    for line in lines:
        line["scalars"] |= {"moved/h.0": 0.1, "trajectory/distance": 1.0, "layer_update_ratio/h": 1}
    write(tmp_path, lines)
    sections = [figures(part) for part in render(tmp_path).split("<section>")]
    assert sections[2:] == [
        ["Loss", "Gradient norm"],
        [
            *("Gradient norm by layer", "Update-to-weight ratio by layer"),
            "Gradient norm by layer over the steps",
        ],
        [
            *("Distance from the start, path length", "Relative change by layer"),
            "Path of the parameters on its principal axes",
        ],
    ]


def test_a_logarithmic_axis_is_called_so() -> None:
    curve = Series(np.arange(1.0, 3.0), np.arange(1.0, 3.0))
    assert legend_text(line_chart("t", {"a": curve}, log=True)) == "log scale"
    assert legend_text(line_chart("t", {"a": curve, "b": curve}, log=True)) == "ablog scale"
    assert "log scale" not in line_chart("t", {"a": curve})


def test_nothing_to_show_is_no_chart() -> None:
    assert line_chart("t", {}) == ""
    assert line_chart("t", {"a": Series(np.arange(2.0), -np.ones(2))}, log=True) == ""
    assert "circle" in line_chart("t", {"a": Series(np.ones(1), np.ones(1))})


@pytest.mark.parametrize("log", [False, True])
def test_where_a_curve_is_not_finite_there_is_a_band(log: bool) -> None:
    """A value is that of the steps since the one before: 200 takes the place of 100 to 200."""
    steps = np.array([100.0, 200.0, 300.0, 400.0, 500.0, 600.0])
    values = np.array([1.0, np.nan, 3.0, 4.0, -np.inf, np.inf])
    chart = line_chart("t", {"a": Series(steps, values)}, log=log, steps=(0, 600))
    x = [52 + 416 * step / 600 for step in (100, 200, 300, 400, 600)]
    assert bands(chart) == pytest.approx([x[0], x[1], x[3], x[4]], abs=0.11)
    assert [dot.attrib["cx"] for dot in drawing(chart).iter("circle")] == [f"{x[0]:.1f}"]
    (line,) = drawing(chart).iter("polyline")  # and no line through the gap
    xs = [float(point.split(",")[0]) for point in line.attrib["points"].split()]
    assert xs == pytest.approx([x[2], x[3]], abs=0.06)
    assert legend(chart) == ["NaN or Inf"]


def test_a_curve_that_is_never_finite() -> None:
    steps = np.array([50.0, 100.0])
    good, bad = Series(steps, np.array([1.0, 2.0])), Series(steps, np.array([np.nan, np.inf]))
    alone = line_chart("t", {"a": bad}, steps=(0, 200))
    assert bands(alone) == [52.0, 260.0]
    assert 'class="grid"' not in alone  # there are no values to read off
    both = line_chart("t", {"a": good, "b<": bad})
    assert bands(both) == [52.0, 468.0]
    assert len(list(drawing(both).iter("polyline"))) == 1
    assert legend(both) == ["a", "NaN or Inf: b&lt;"]
    assert legend(line_chart("t", {"a": bad, "b": bad})) == ["NaN or Inf"]  # all of them
    many = line_chart("t", {str(i): bad for i in range(30)} | {"good": good})
    assert legend(many) == ["good", "NaN or Inf: 0, 1, 2 and 27 more"]


def test_an_evaluation_that_is_not_finite_says_nothing_of_the_steps_before_it(
    tmp_path: Path,
) -> None:
    """The training's loss is there until step 90, and the first evaluation is of step 100."""
    lines = [
        {"step": 10 * i, "scalars": {"train/loss": 3.0 if i < 10 else "NaN"}} for i in range(1, 21)
    ]
    lines[9]["scalars"]["eval/loss"] = lines[19]["scalars"]["eval/loss"] = "NaN"
    write(tmp_path, lines)
    (loss,) = re.findall(r"<figure><svg.*?</figure>", render(tmp_path), re.DOTALL)
    assert bands(loss) == pytest.approx([52 + 416 * 90 / 200, 468], abs=0.11)
    alone = Series(np.array([100.0, 200.0]), np.array([np.nan, 2.0]), of_moments=True)
    assert bands(line_chart("t", {"a": alone}, steps=(0, 200))) == pytest.approx(
        [260 - 3, 260], abs=0.11
    )


def test_one_value_of_many_that_is_not_finite_is_seen() -> None:
    values = np.ones(100_000)
    values[[0, 50_000]] = np.nan
    chart = line_chart("t", {"a": Series(np.arange(100_000.0), values)})
    assert bands(chart) == pytest.approx([52, 55, 257, 260], abs=0.11)
    values[::2] = np.nan
    chart = line_chart("t", {"a": Series(np.arange(100_000.0), values)})
    assert bands(chart) == [52.0, 468.0]
    assert len(chart) < 100_000


def test_all_charts_have_the_steps_of_the_run(tmp_path: Path) -> None:
    """The loss is lost at step 107; the learning rate goes on to the end."""
    losses = [1.3, 0.8, "NaN", "NaN", "NaN"]
    lines = [
        {"step": 50 * i, "scalars": {"train/loss": loss, "train/learning_rate": 0.1 * i}}
        for i, loss in enumerate(losses, start=1)
    ]
    lines[1]["scalars"]["trajectory/distance"] = 2.0
    write(tmp_path, lines)
    charts = re.findall(r"<figure><svg.*?</figure>", render(tmp_path), re.DOTALL)
    for chart in charts:
        ticks = [t.text for t in drawing(chart).iter("text") if t.attrib["y"] == "262"]
        assert ticks == ["0", "100", "200"]
    loss, rate, distance = charts
    assert bands(loss) == pytest.approx([52 + 416 * 100 / 250, 468], abs=0.11)
    assert bands(rate) == bands(distance) == []
    (dot,) = drawing(distance).iter("circle")
    assert float(dot.attrib["cx"]) == pytest.approx(52 + 416 * 100 / 250, abs=0.06)


@pytest.mark.parametrize(
    ("lines", "ticks"),
    [
        ([(100, True)], ["0", "50", "100"]),  # a publication is of the steps before it
        ([(1050, True), (1100, True)], ["1,000", "1,050", "1,100"]),
        ([(1000, False), (1050, True)], ["1,000", "1,020", "1,040"]),  # only a text: the start
        ([(0, False)], []),
        ([(0, True)], ["0", "1"]),  # no half steps
        ([(-3, True), (-1, True)], ["-3", "-2", "-1"]),
    ],
)
def test_the_first_step_of_the_charts(
    tmp_path: Path, lines: list[tuple[int, bool]], ticks: list[str]
) -> None:
    write(tmp_path, [{"step": s, "scalars": {"train/loss": 1} if x else {}} for s, x in lines])
    charts = re.findall(r"<figure><svg.*?</figure>", render(tmp_path), re.DOTALL)
    texts = [t for chart in charts for t in drawing(chart).iter("text")]
    assert [t.text for t in texts if t.attrib["y"] == "262"] == ticks


@pytest.mark.parametrize(
    ("values", "log", "limits", "ticks"),
    [
        ([0.0, 0.0], False, None, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([0.0, 0.0], False, (0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([0.9, 0.9], False, (0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([0.5], False, (-1, 1), ["-1", "-0.5", "0", "0.5", "1"]),
        ([0.1, 0.1], False, None, ["0", "0.05", "0.1", "0.15", "0.2"]),
        ([-2.0, -2.0], False, None, ["-4", "-3", "-2", "-1", "0"]),
        ([1.0, 1.0], True, None, ["0.5", "1", "2"]),
        ([0.4, 0.6], False, (0, 1), ["0.4", "0.45", "0.5", "0.55", "0.6"]),
    ],
)
def test_the_axis_of_a_constant(
    values: list[float], log: bool, limits: tuple[float, float] | None, ticks: list[str]
) -> None:
    curve = Series(np.arange(len(values), dtype=float), np.array(values))
    chart = line_chart("t", {"a": curve}, log=log, limits=limits)
    assert re.findall(r'class="tick end">([^<]*)<', chart)[: len(ticks)] == ticks


def test_the_heat_map(tmp_path: Path) -> None:
    """Its picture is of pixels alone; what is to be read is text, in the page's size."""
    norms = {"first<": [0.01, 0.1, 1.0], "second": [0.0, "NaN", 100.0]}
    lines = [
        {"step": 500 * i, "scalars": {f"layer_grad_norm/{n}": v[i - 1] for n, v in norms.items()}}
        for i in (1, 2, 3)
    ]
    write(tmp_path, lines)
    (figure,) = re.findall('<figure class="map">.*?</figure>', render(tmp_path))
    assert re.findall("<bdi>([^<]*)</bdi>", figure) == ["first&lt;", "second"]
    assert re.findall("<span>([^<]+)</span>", figure) == ["step 500", "1,500"]
    scale, missing, broken = re.findall('"scale">(.*?)</span>|</i>([^<]*)<', figure)
    assert re.sub("<.*>", "-", scale[0]) == "0.01 - 100, log scale"
    assert (missing[1], broken[1]) == ("NaN or Inf", "none or zero")
    data = re.findall('base64,([^"]*)', figure)[0]
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (1024, 48)
    assert figure.count("height:24px") == 2  # of the names; a row of the picture
    assert "height:48px" in figure
    middles = [[picture.getpixel((x, y)) for x in (170, 512, 850)] for y in (12, 36)]
    assert middles[1][:2] == [MISSING, NOT_FINITE]
    shares = np.array([0, 0.25, 0.5, 1])  # of the four powers of ten from 0.01 to 100
    assert [*middles[0], middles[1][2]] == [tuple(colour) for colour in colours(shares).tolist()]


def test_a_heat_map_of_many_layers_has_as_many_names_as_fit(tmp_path: Path) -> None:
    layers = {f"layer_grad_norm/{i}": 1.0 for i in range(100)}
    write(tmp_path, [{"step": 1, "scalars": layers}, {"step": 2, "scalars": layers}])
    (figure,) = re.findall('<figure class="map">.*?</figure>', render(tmp_path))
    names = re.findall(r'<span style="line-height:18px"><bdi>(\d+)<', figure)
    assert names == [str(i) for i in range(0, 99, 3)]  # 6 pixels a layer, 15 a name
    assert "height:600px" in figure
    assert "NaN or Inf" not in figure


def test_the_path(tmp_path: Path) -> None:
    """A long way right and up, then 30 points in one place: two of 9 labels are apart."""
    points = [[0.0, 0.0], [30.0, 10.0], [60.0, 20.0]] + [[60.0 + i / 100, 20.0] for i in range(30)]
    lines = [
        {"step": 10 * i, "scalars": {}, "arrays": {"trajectory/point": point + [0.0] * 62}}
        for i, point in enumerate(points)
    ]
    # Where it started comes with the first publication, and is told again after an interruption.
    start, lines = lines[0]["arrays"]["trajectory/point"], lines[1:]
    lines[0]["arrays"]["trajectory/start"] = [0, *start]
    lines[3]["arrays"]["trajectory/start"] = [0, *start]
    lines[4]["arrays"]["trajectory/start"] = []
    write(tmp_path, lines)
    (figure,) = re.findall("<figure>.*?</figure>", render(tmp_path))
    svg = drawing(figure)
    title, *labels = svg.iter("text")
    assert title.text == "Path of the parameters on its principal axes"
    assert [label.text for label in labels] == ["320", "0"]
    *_, first, last = svg.iter("circle")  # upon the others
    assert (first.attrib["style"], last.attrib["style"]) == (
        "fill:var(--c2)",
        "fill:var(--serious)",
    )
    ends = [float(dot.attrib["cx"]) for dot in (first, last)]
    assert abs(ends[0] - ends[1]) == pytest.approx(480 - 2 * 32, abs=0.11)
    assert "100 % of the variance across, 0 % upwards; extent 63.5" in legend_text(figure)
    assert "step 0step 320" in legend_text(figure)


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
    assert figures(page) == ["Loss", "Gradient norm"]
    assert page.count("</i>NaN or Inf<") == 2

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
