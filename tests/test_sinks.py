"""Files are read back as their readers would: TensorBoard's own loaders, and JSON."""

import contextlib
import dataclasses
import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard import context
from tensorboard.backend.event_processing import (
    data_provider,
    event_file_loader,
    plugin_event_accumulator,
    plugin_event_multiplexer,
)
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.util import tensor_util

from pyvizllm.models.gpt import GPT, GPTConfig
from pyvizllm.ops import BINS
from pyvizllm.telemetry import (
    HistogramTable,
    HistorySink,
    JsonlSink,
    Publication,
    TensorBoardSink,
    TerminalSink,
    read_history,
)
from pyvizllm.telemetry.records import Finding, Picture


def table_of(**tensors: np.ndarray) -> list[HistogramTable]:
    """`grad/NAME` for every tensor, as a publication takes it."""
    counts, moments = [], []
    for values in tensors.values():
        narrow = values.astype(np.float32)
        counts.append(np.bincount(narrow.view(np.uint32) >> 20, minlength=BINS).astype(np.int64))
        wide = narrow.astype(np.float64)
        moments.append([wide.min(), wide.max(), wide.sum(), (wide**2).sum()])
    tags = tuple(f"grad/{name}" for name in tensors)
    return [HistogramTable(tags, np.stack(counts), np.array(moments))]


def scalars_at(step: int, **scalars: float) -> Publication:
    return Publication(step, 1e9 + step, {f"train/{k}": v for k, v in scalars.items()})


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()


def steps_and_values(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_tensorboard_reads_scalars_steps_times_and_tags(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (10, 20):
        sink.write(Publication(step, 1e9 + step, {"train/loss": step / 4, "eval/loss": 7.5}))
    sink.close()
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    losses = [(event.step, event.value, event.wall_time) for event in events.Scalars("train/loss")]
    assert losses == [(10, 2.5, 1e9 + 10), (20, 5.0, 1e9 + 20)]


def test_losses_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(scalars_at(1, loss=math.nan, perplexity=math.inf, worst=-math.inf, big=1e300))
    sink.close()
    events = read(tmp_path)
    assert math.isnan(events.Scalars("train/loss")[0].value)
    assert events.Scalars("train/perplexity")[0].value == math.inf
    assert events.Scalars("train/worst")[0].value == -math.inf
    assert events.Scalars("train/big")[0].value == math.inf  # TensorBoard's scalars are float32


def test_tensorboard_reads_both_histograms(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=2_000).astype(np.float32) * 1e-3
    values[:100] = 0
    sink = TensorBoardSink(tmp_path)
    sink.write(Publication(5, 1e9, histograms=table_of(**{"h.0.weight": values})))
    sink.close()
    events = read(tmp_path)
    assert sorted(events.Tags()["histograms"]) == ["grad/h.0.weight", "grad_log10/h.0.weight"]

    (event,) = events.Histograms("grad/h.0.weight")
    shown = event.histogram_value
    wide = values.astype(np.float64)
    assert event.step == 5
    assert (shown.min, shown.max, shown.num) == (wide.min(), wide.max(), 2_000)
    assert (shown.sum, shown.sum_squares) == (wide.sum(), (wide**2).sum())
    assert sum(shown.bucket) == 2_000
    assert len(shown.bucket) == len(shown.bucket_limit) < 400
    for limit, below in zip(shown.bucket_limit, np.cumsum(shown.bucket), strict=True):
        assert below == ((wide < limit) | ((wide == limit) & (limit < 0))).sum()

    (event,) = events.Histograms("grad_log10/h.0.weight")
    shown, logs = event.histogram_value, np.log10(np.abs(wide[wide != 0]))
    assert sum(shown.bucket) == shown.num == 1_900
    assert shown.min <= logs.min()
    assert shown.max == pytest.approx(logs.max(), abs=1e-12)


def test_the_default_loader_of_tensorboard_gets_the_same_buckets(tmp_path: Path) -> None:
    values = np.array([-1e30, -2.0, -2.0, 0.0, 3.0, 1e30])
    sink = TensorBoardSink(tmp_path)
    sink.write(Publication(1, 1e9, histograms=table_of(w=values)))
    sink.close()
    loader = event_file_loader.EventFileLoader(str(sink.path))
    shown = {
        value.tag: tensor_util.make_ndarray(value.tensor)
        for event in loader.Load()
        for value in event.summary.value
    }
    left, right, counts = shown["grad/w"].T
    # All but +-1e30 are a pixel of that range: one bucket up to zero and one above.
    assert counts[counts > 0].tolist() == [1, 3, 1, 1]
    assert (left[0], right[-1]) == (np.float32(-1e30), np.float32(1e30))
    np.testing.assert_array_equal(left[1:], right[:-1])
    left, right, counts = shown["grad_log10/w"].T
    assert counts[counts > 0].tolist() == [2, 1, 2]
    assert right[-1] == pytest.approx(30, abs=1e-5)


def test_the_description_says_where_the_stage_is(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    values = table_of(w=np.array([1.0, -2.0]))
    scalars = {"train/grad_norm": 1.0, "grad_norm/w": 2.0, "my/own": 3.0}
    for step in (1, 2):
        sink.write(Publication(step, 1e9, scalars, values, {"config": "text"}))
    sink.close()
    plain = read(tmp_path)
    loader = event_file_loader.EventFileLoader(str(sink.path))
    first: dict[str, str] = {}
    for event in loader.Load():
        for value in event.summary.value:
            first.setdefault(value.tag, value.metadata.summary_description)
    for tag in ("train/grad_norm", "grad_norm/w", "grad/w", "grad_log10/w"):
        assert "Before or after clipping: see the text pyvizllm/gradient_stage." in first[tag]
        assert plain.SummaryMetadata(tag).summary_description == first[tag]
    assert first["my/own"] == ""
    assert [event.value for event in plain.Scalars("grad_norm/w")] == [2.0, 2.0]
    assert len(plain.Histograms("grad/w")) == 2


def test_histograms_without_anything_to_show_are_left_out(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    nothing = np.array([math.nan, math.inf])
    with np.errstate(invalid="ignore"):
        tables = table_of(nan=nothing, zero=np.zeros(10))
    sink.write(Publication(1, 1e9, histograms=tables))
    sink.close()
    events = read(tmp_path)
    assert events.Tags()["histograms"] == ["grad/zero"]
    shown = events.Histograms("grad/zero")[0].histogram_value
    assert (shown.min, shown.max, shown.num, shown.bucket) == (0, 0, 10, [10])


def test_text_and_cleaned_tags(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(Publication(0, 1e9, {"/a b:c/ü.d-e": 1.0}, texts={"config": "| a | b |"}))
    sink.close()
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["a_b_c/ü.d-e"]
    assert events.Tags()["tensors"] == ["config/text_summary"]
    assert events.Tensors("config/text_summary")[0].tensor_proto.string_val == [b"| a | b |"]
    assert events.SummaryMetadata("config/text_summary").plugin_data.plugin_name == "text"


FINDING = Finding(
    rule="vanishing_gradients",
    severity="serious",
    step=40,
    message="gradients of h.0 are 1e-9 of those of h.7",
    advice="Lower the depth.",
    evidence={"ratio": 1.23456789e-9, "worst": math.inf, "layer": "h.0"},
)


def test_findings_are_texts(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    other = dataclasses.replace(
        FINDING, advice="", evidence={"samples": ""}, severity="info", step=41
    )
    sink.write(Publication(50, 1e9, findings=[FINDING, other]))
    sink.close()
    (event,) = read(tmp_path).Tensors("diagnosis/vanishing_gradients/text_summary")
    assert event.step == 50
    assert event.tensor_proto.string_val[0].decode() == (
        "**serious**, step 40: gradients of h.0 are 1e-9 of those of h.7.\n\n"
        "Lower the depth.\n\n"
        "- ratio: 1.23457e-09\n- worst: inf\n- layer: h.0\n\n"
        "**info**, step 41: gradients of h.0 are 1e-9 of those of h.7."
    )


def test_the_stage_of_the_gradients_is_a_sentence(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(Publication(1, 1e9, texts={"pyvizllm/gradient_stage": "before clipping"}))
    sink.close()
    (event,) = read(tmp_path).Tensors("pyvizllm/gradient_stage/text_summary")
    assert event.tensor_proto.string_val == [b"Gradients are measured: **before clipping**."]


def test_images(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n and so on"
    sink = TensorBoardSink(tmp_path)
    sink.write(Publication(3, 1e9, images={"heat map/grad": Picture(png, 20, 10)}))
    sink.close()
    (event,) = read(tmp_path).Images("heat_map/grad")
    assert (event.step, event.encoded_image_string) == (3, png)
    assert (event.width, event.height) == (20, 10)


def charts_of(event: Any) -> dict[str, dict[str, list[str]]]:
    """Category -> chart -> patterns of the dashboard in an event."""
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def test_the_dashboard_and_the_hyper_parameters_of_a_run(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "run")
    layout = {"losses": {"all": ["train/loss", "eval/.*"]}, "norms": {"by layer": ["grad_norm/.*"]}}
    hparams = {"learning_rate": 1e-3, "bf16": True, "name": "gpt", "steps": 10}
    sink.write(Publication(0, 1e9, {"train/loss": 1.5}, layout=layout, hparams=hparams))
    sink.write(Publication(1, 1e9, {"grad_norm/h 0": 1.0}))
    sink.close()

    again = TensorBoardSink(tmp_path / "run", purge_step=2)  # what follows logs less
    again.write(Publication(2, 1e9, {"grad_norm/h 0": 1.0}, layout=layout))
    again.close()

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path)).Reload()
    first, second, last = multiplexer.Tensors("run", "custom_scalars__config__")
    assert charts_of(first) == {"losses": layout["losses"]}  # no chart without a curve
    assert charts_of(second) == charts_of(last) == layout
    assert (first.step, second.step, last.step) == (0, 1, 2)

    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    board = base_plugin.TBContext(data_provider=provider, logdir=str(tmp_path))
    request = api_pb2.ListSessionGroupsRequest(slice_size=9, allowed_statuses=range(4))
    (group,) = (
        list_session_groups.Handler(
            context.RequestContext(), backend_context.Context(board), "", request
        )
        .run()
        .session_groups
    )
    values = {name: value.WhichOneof("kind") for name, value in group.hparams.items()}
    assert values == {
        "learning_rate": "number_value",
        "bf16": "bool_value",
        "name": "string_value",
        "steps": "number_value",
    }
    assert group.hparams["learning_rate"].number_value == 1e-3
    assert [(metric.name.tag, metric.value) for metric in group.metric_values] == [
        ("train/loss", 1.5)
    ]


def test_the_graph_of_a_model(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout())
    sink = TensorBoardSink(tmp_path)
    state = torch.get_rng_state()
    sink.write_graph(model, (torch.zeros(2, 3),))
    sink.close()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    names = [node.name for node in read(tmp_path).Graph().node]
    assert "Sequential/Linear[0]/weight/weight" in names


def test_the_graph_of_our_own_model(tmp_path: Path) -> None:
    """A GPT checks the length of its text, of which torch's tracer would warn (an error here)."""
    model = GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=4))
    sink = TensorBoardSink(tmp_path)
    sink.write_graph(model, (torch.zeros(2, 8, dtype=torch.int64),))
    sink.close()
    operations = {node.name.rpartition("/")[0]: node.op for node in read(tmp_path).Graph().node}
    assert {
        "GPT/Embedding[token_embedding]": "aten::embedding",
        "GPT/Block[1]/MLP[mlp]/Linear[projection]": "aten::linear",
        "GPT/Linear[head]": "aten::linear",
    }.items() <= operations.items()


@pytest.mark.parametrize("width", [3, 5])
def test_the_graph_leaves_every_module_in_its_mode(tmp_path: Path, width: int) -> None:
    """A frozen norm in a model that trains; also where the model cannot be traced."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4).eval())
    sink = TensorBoardSink(tmp_path)
    with pytest.raises(RuntimeError) if width == 5 else contextlib.nullcontext():
        sink.write_graph(model, (torch.zeros(2, width),))
    sink.close()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_texts_with_halves_of_characters_are_shown(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    found = Finding("non_finite", "serious", 1, "in \udcff.txt", "")
    sink.write(Publication(1, 1e9, texts={"a": "\udcff.txt"}, findings=[found]))
    sink.close()
    shown = {
        tag: read(tmp_path).Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0]
        for tag in ("a", "diagnosis/non_finite")
    }
    assert shown == {"a": b"?.txt", "diagnosis/non_finite": b"**serious**, step 1: in ?.txt."}


def test_a_large_publication_is_several_records(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    count = 1000
    tables = table_of(**{f"{i}": generator.normal(size=9_000) for i in range(count)})
    sink = TensorBoardSink(tmp_path)
    sink.write(Publication(1, 1e9, {"x": 1.0}, tables))
    sink.close()
    loaded = list(event_file_loader.RawEventFileLoader(str(sink.path)).Load())
    assert 4 <= len(loaded) < 10
    assert max(map(len, loaded)) < 5 << 20
    assert len(read(tmp_path).Tags()["histograms"]) == 2 * count


def test_the_rank_is_in_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    sink = TensorBoardSink(tmp_path)
    sink.close()
    assert f".rank3.{os.getpid()}." in sink.path.name


def test_what_is_written_is_on_disk_before_flush_returns(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    before = sink.path.stat().st_size
    sink.write(scalars_at(1, loss=2.0))
    sink.flush()
    assert sink.path.stat().st_size > before
    assert steps_and_values(tmp_path, "train/loss") == [(1, 2.0)]  # the sink is still open
    sink.close()


def test_files_made_at_the_same_moment_do_not_collide(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        sinks = list(threads.map(lambda _: TensorBoardSink(tmp_path), range(16)))
    for step, sink in enumerate(sinks, start=1):
        sink.write(scalars_at(step, loss=float(step)))
        sink.close()
    assert len(list(tmp_path.iterdir())) == len({sink.path for sink in sinks}) == 16
    for step, sink in enumerate(sinks, start=1):
        assert steps_and_values(sink.path, "train/loss") == [(step, float(step))]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step in range(1, 8):
        first.write(scalars_at(step, loss=1.0))
    first.close()
    second = TensorBoardSink(tmp_path, purge_step=5)
    for step in (5, 6):
        second.write(scalars_at(step, loss=2.0))
    second.close()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]
    assert steps_and_values(tmp_path, "train/loss") == expected


@pytest.mark.parametrize("purge_step", [0, None])
def test_a_fresh_run_can_be_resumed_from_its_start(tmp_path: Path, purge_step: int | None) -> None:
    """TensorBoard's server (its loader in Python) ignores a folder's first START as that of a
    fresh run, so a fresh run has to write one, or the resumed one's would purge nothing."""
    first = TensorBoardSink(tmp_path, purge_step=purge_step)
    first.write(scalars_at(3, loss=1.0))
    first.close()
    second = TensorBoardSink(tmp_path, purge_step=1)
    second.write(scalars_at(1, loss=2.0))
    second.close()
    assert steps_and_values(tmp_path, "train/loss") == [(1, 2.0)]
    server = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = [
        (e.step, float(tensor_util.make_ndarray(e.tensor_proto)))
        for e in server.Tensors("train/loss")
    ]
    assert shown == [(1, 2.0)]


def test_a_second_file_without_purge_step_adds_to_the_first(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = TensorBoardSink(tmp_path)
        sink.write(scalars_at(step, loss=float(step)))
        sink.close()
    assert steps_and_values(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("make", [TensorBoardSink, lambda path: JsonlSink(path / "run.jsonl")])
def test_a_folder_that_cannot_be_written_is_a_sentence(make, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(OSError, match=r"^\w+Sink: cannot write to .*file.*: (File|Not a)") as error:
        make(file)
    assert isinstance(error.value.__cause__, OSError)
    assert file.read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write to the run folder .*: Permission denied"):
        TensorBoardSink(tmp_path)


def test_jsonl_lines_follow_the_schema(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "new" / "run.jsonl")
    sink.write(Publication(0, 1.5, texts={"config": "a\nb"}))
    odd = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)}
    sink.write(Publication(1, 2.5, {"loss": 0.1, **odd}))
    sink.write(Publication(2, 3.5, histograms=table_of(w=np.ones(1))))
    lines = sink.path.read_text().splitlines()  # before any flush: a line is one write
    sink.close()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 0, "wall_time": 1.5, "scalars": {}, "texts": {"config": "a\nb"}},
        {
            "step": 1,
            "wall_time": 2.5,
            "scalars": {"loss": 0.1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5},
        },
    ]
    assert [float(word) for word in ("Infinity", "-Infinity")] == [math.inf, -math.inf]


def test_jsonl_appends_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "sca')
    sink = JsonlSink(path)
    sink.write(Publication(2, 0.0, {"loss": 1.0}))
    sink.close()
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"step": 2, "sca']
    assert json.loads(lines[2])["scalars"] == {"loss": 1.0}


def test_jsonl_has_findings_and_arrays(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink.write(Publication(50, 1.5, arrays={"a": [np.float32(0.5), math.nan]}, findings=[FINDING]))
    sink.close()
    (line,) = sink.path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 50,
        "wall_time": 1.5,
        "scalars": {},
        "arrays": {"a": [0.5, "NaN"]},
        "findings": [
            {
                "rule": "vanishing_gradients",
                "severity": "serious",
                "step": 40,
                "message": "gradients of h.0 are 1e-9 of those of h.7",
                "advice": "Lower the depth.",
                "evidence": {"ratio": 1.23456789e-9, "worst": "Infinity", "layer": "h.0"},
            }
        ],
    }
    (entry,) = read_history(sink.path)
    assert entry["arrays"]["a"][0] == 0.5
    assert math.isnan(entry["arrays"]["a"][1])
    assert entry["findings"] == json.loads(line)["findings"]


def test_history_is_read_back_by_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink.write(Publication(0, 1.0, texts={"config": "x"}))
    sink.write(Publication(10, 2.0, {"train/loss": 3.0, "b": math.nan}))
    sink.write(Publication(10, 3.0, {"eval/loss": 4.0}))
    sink.write(Publication(20, 4.0, {"train/loss": 2.0}, findings=[FINDING]))
    sink.write(Publication(30, 5.0, {"train/loss": 1.0}))
    sink.close()
    with sink.path.open("ab") as file:
        file.write(b'{"step": 40, "wall')  # killed
    entries = read_history(sink.path)
    assert [entry["step"] for entry in entries] == [0, 10, 20, 30]
    assert entries[0]["texts"] == {"config": "x"}
    assert math.isnan(entries[1]["scalars"].pop("b"))
    assert entries[1] == {
        "step": 10,
        "wall_time": 3.0,
        "scalars": {"train/loss": 3.0, "eval/loss": 4.0},
        "texts": {},
        "arrays": {},
        "findings": [],
    }
    resumed = JsonlSink(sink.path)
    resumed.write(Publication(20, 6.0, {"train/loss": 2.5}))
    resumed.close()
    entries = read_history(sink.path)
    assert [entry["step"] for entry in entries] == [0, 10, 20]
    assert (entries[2]["scalars"], entries[2]["findings"]) == ({"train/loss": 2.5}, [])


def test_history_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(
        ValueError, match=r'expected lines of a run.s history in .*, got {"epoch": 1}'
    ):
        read_history(tmp_path / "other.jsonl")
    with pytest.raises(OSError, match="No such file"):
        read_history(tmp_path / "none.jsonl")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_terminal_shows_a_line_and_the_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    scalars = {"train/loss": 3.21456, "train/grad_norm": 1.0234, "health/nans": 0.0}
    publications = [
        Publication(0, 0.0, {"a": 1.0}, texts={"config": "x"}),
        Publication(50, 0.0, scalars | {"train/tokens_per_second": 12345.6}, findings=[FINDING]),
        Publication(60, 0.0, {"eval/loss": math.nan}),
    ]
    for stream, title in (
        (io.StringIO(), "serious (step 40, vanishing_gradients)"),
        (Terminal(), "\033[31mserious (step 40, vanishing_gradients)\033[0m"),
    ):
        sink = TerminalSink(stream)
        for publication in publications:
            sink.write(publication)
        sink.close()
        assert stream.getvalue().splitlines() == [
            "step 50  loss 3.2146  grad norm 1.02  12,346 tokens/s",
            f"{title}: gradients of h.0 are 1e-9 of those of h.7. Lower the depth.",
            "step 60  eval loss nan",
        ]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    TerminalSink(plain).write(publications[1])
    assert "\033" not in plain.getvalue()


def test_history_keeps_the_scalars_of_each_publication() -> None:
    sink = HistorySink()
    sink.write(Publication(0, 0.0, texts={"config": "x"}))
    sink.write(Publication(10, 0.0, {"train/loss": 2.0}))
    sink.write(Publication(10, 0.0, {"eval/loss": 3.0}))
    assert sink.history == [{"step": 10, "train/loss": 2.0}, {"step": 10, "eval/loss": 3.0}]


def test_a_stream_that_nobody_looks_at_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is serious is then logged, too."""
    assert not TerminalSink(io.StringIO()).is_live
    assert TerminalSink().is_live
    monkeypatch.setattr("sys.stderr", None)
    assert not TerminalSink().is_live
