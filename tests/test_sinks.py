"""Files are read back as their readers would: TensorBoard's own loaders, and JSON."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_file_loader, plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)
from tensorboard.util import tensor_util

from pyvizllm.ops import BINS
from pyvizllm.telemetry import (
    HistogramTable,
    HistorySink,
    JsonlSink,
    Publication,
    TensorBoardSink,
)


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


def test_the_stage_is_in_the_description(tmp_path: Path) -> None:
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
        assert "accumulated over the step's micro-batches, before clipping" in first[tag]
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


def test_history_keeps_the_scalars_of_each_publication() -> None:
    sink = HistorySink()
    sink.write(Publication(0, 0.0, texts={"config": "x"}))
    sink.write(Publication(10, 0.0, {"train/loss": 2.0}))
    sink.write(Publication(10, 0.0, {"eval/loss": 3.0}))
    assert sink.history == [{"step": 10, "train/loss": 2.0}, {"step": 10, "eval/loss": 3.0}]
