"""A watched training as a user has it: everything that is in the run's folder afterwards."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.nn import functional as F

import pyvizllm
from pyvizllm.telemetry import load_flight, read_history
from pyvizllm.telemetry.dashboard import LAYOUT
from pyvizllm.telemetry.descriptions import STAGE_TAG
from pyvizllm.telemetry.flight_recorder import flight_text

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "ours": lambda parameters: pyvizllm.AdamW(parameters, lr=1e-2),
}


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(32, 8, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0}).Reload()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_watched_training_leaves(tmp_path: Path, name: str) -> None:
    model = classifier()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = OPTIMIZERS[name](model.parameters())
    with pyvizllm.watch(model, optimizer, tmp_path, every=5, hparams={"lr": 1e-2}) as watch:
        for step in range(1, 21):
            inputs, targets = batch(step)
            half = slice(16), slice(16, None)
            for part in half:
                loss = F.cross_entropy(model(inputs[part]), targets[part]) / 2
                loss.backward()
                watch.micro_batch(2 * loss, size=16)
                watch.log(loss=2 * loss)
            pyvizllm.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history if entry["scalars"]] == [5, 10, 15, 20]
    last = history[-1]["scalars"]
    distance = torch.cat(
        [(p.detach() - q).flatten() for p, q in zip(model.parameters(), start, strict=True)]
    ).norm()
    # A sketch of four small tensors: two standard deviations are some 20 %.
    assert last["trajectory/distance"] == pytest.approx(float(distance), rel=0.3)
    assert last["trajectory/path_length"] > last["trajectory/distance"] * 0.99
    assert {
        "noise/scale",
        "moved/0",
        "moved/2",
        "layer_grad_norm/0",
        "update_ratio/0.weight",
    } <= set(last)
    texts = {tag: text for entry in history for tag, text in entry["texts"].items()}
    assert texts[STAGE_TAG] == "before clipping"
    assert [finding for entry in history for finding in entry["findings"]] == []

    shown = events(tmp_path)
    tags = shown.Tags()
    assert {"grad/0.weight", "update_log10/2.bias", "param/2.weight"} <= set(tags["histograms"])
    assert {"heatmap/grad_norm", "trajectory/path"} <= set(tags["images"])
    # All charts but those of what did not happen: no evaluation, learning metrics, scaler.
    missing = (
        *("eval/", "train/accuracy", "train/tokens", "train/entropy"),
        *("health/skipped", "pyvizllm/dropped"),
    )
    for charts in LAYOUT.values():
        for patterns in charts.values():
            for pattern in patterns:
                found = any(re.fullmatch(pattern, tag) for tag in tags["scalars"])
                assert found or pattern.startswith(missing), pattern
    board = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    newest = board.Tensors("custom_scalars__config__")[-1]
    titles = [
        chart.title
        for category in layout_pb2.Layout.FromString(newest.tensor_proto.string_val[0]).category
        for chart in category.chart
    ]
    empty = {
        *("accuracy", "tokens per second", "entropy of the predictions, nats"),
        *("skipped steps", "dropped publications"),
    }
    assert titles == [t for charts in LAYOUT.values() for t in charts if t not in empty]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_nan_is_found(tmp_path: Path, name: str) -> None:
    model = classifier()
    optimizer = OPTIMIZERS[name](model.parameters())
    with pyvizllm.watch(model, optimizer, tmp_path, every=50) as watch:
        for step in range(1, 31):
            inputs, targets = batch(step)
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            if step == 17:
                model[0].weight.grad[3, 5] = torch.nan
            watch.micro_batch(loss, sample_ids=[step * 100 + i for i in range(3)])
            optimizer.step()
            optimizer.zero_grad()
            if step == 17:
                break
    findings = [f for e in read_history(tmp_path / "history.jsonl") for f in e["findings"]]
    (finding,) = (f for f in findings if f["rule"] == "non_finite")
    assert finding["severity"] == "serious"
    assert finding["step"] == 17
    assert finding["evidence"]["parameter"] == "0.weight"
    assert finding["evidence"]["flat_index"] == 3 * 8 + 5
    assert "[3, 5]" in finding["message"]
    assert "1700" in finding["message"] + finding["evidence"]["samples"]
    flight = load_flight(tmp_path / "flight" / "step-17-non_finite.npz")
    assert flight.steps.tolist() == list(range(1, 18))
    nans = flight.statistic("grad", "nans")
    assert nans.sum() == nans[16, flight.names.index("0.weight")] == 1


def test_a_spike_between_two_publications_is_in_the_histogram(tmp_path: Path) -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pyvizllm.watch(model, optimizer, tmp_path, every=10):
        for step in range(1, 11):
            model.weight.grad = torch.full((4, 4), 1e6 if step == 4 else 1.0)
            optimizer.step()
    (shown,) = events(tmp_path).Histograms("grad_log10/weight")
    counts = dict(
        zip(shown.histogram_value.bucket_limit, shown.histogram_value.bucket, strict=True)
    )
    assert sum(count for limit, count in counts.items() if limit > 5) == 16
    assert sum(counts.values()) == 160


def test_layers_of_a_large_model_share_their_tags(tmp_path: Path) -> None:
    model = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(2, 2) for _ in range(48))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, tmp_path, every=1, max_tags=450):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    tags = events(tmp_path).Tags()
    assert len(tags["histograms"]) == 48 * 6
    assert "grad/h.07" in tags["histograms"]
    assert "layer_grad_norm/h.47" in tags["scalars"]
    (entry,) = read_history(tmp_path / "history.jsonl")
    assert "max_tags=450" in entry["texts"]["pyvizllm/notice"]


@pytest.mark.parametrize("max_tags", [1, 9, 100, 431, 432])
def test_tags_are_no_more_than_asked_for(tmp_path: Path, max_tags: int) -> None:
    model = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(2, 2) for _ in range(48))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, tmp_path, every=1, max_tags=max_tags):
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    kinds = "grad|param|update|grad_log10|param_log10|update_log10"
    of_layer = re.compile(rf"({kinds}|layer_grad_norm|layer_update_ratio|moved)/h\.(\d+)")
    tags = events(tmp_path).Tags()
    shown = [
        match for tag in (*tags["histograms"], *tags["scalars"]) if (match := of_layer.match(tag))
    ]
    layers = {int(match[2]) for match in shown}
    assert len(shown) == 9 * len(layers) == max_tags // 9 * 9  # nine of each of 48 layers
    if max_tags >= 18:
        assert {0, 47} <= layers  # evenly over all of them
    texts = read_history(tmp_path / "history.jsonl")[0]["texts"]
    some = "48" if max_tags == 432 else f"{max_tags // 9} of 48"
    assert f"histograms and scalars are of {some} layers" in texts["pyvizllm/notice"]


def test_names_that_tensorboard_would_confuse_or_no_file_could_hold(tmp_path: Path) -> None:
    model = nn.ModuleDict({"x y": nn.Linear(4, 4), "x_y": nn.Linear(4, 4)})
    model.register_parameter("half\ud800", nn.Parameter(torch.ones(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, tmp_path, every=1):
        for step in range(1, 3):
            for number, parameter in enumerate(model.parameters(), 1):
                parameter.grad = torch.full_like(parameter, 1.0 * number * step)
            optimizer.step()
    (file,) = tmp_path.glob("events.*")
    shown: list[tuple[int, str]] = []
    for event in LegacyEventFileLoader(str(file)).Load():
        shown += [(event.step, value.tag) for value in event.summary.value]
    assert len(set(shown)) == len(shown)
    loaded = events(tmp_path)
    norms = {
        tag: [event.value for event in loaded.Scalars(f"layer_grad_norm/{tag}")]
        for tag in ("half_ud800", "x_y", "x_y_2")
    }
    # 16 weights and 4 biases: sqrt(16 a^2 + 4 b^2), of the gradients a and b
    assert norms["half_ud800"] == [2.0, 4.0]
    assert norms["x_y"] == pytest.approx([(16 * 4 + 4 * 9) ** 0.5 * n for n in (1, 2)])
    assert norms["x_y_2"] == pytest.approx([(16 * 16 + 4 * 25) ** 0.5 * n for n in (1, 2)])
    assert "grad_norm/half\\ud800" in read_history(tmp_path / "history.jsonl")[-1]["scalars"]


@pytest.mark.parametrize("steps", [60, 63])
def test_the_pictures_at_the_end_show_the_end(tmp_path: Path, steps: int) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pyvizllm.watch(model, optimizer, tmp_path, every=5):
        for step in range(1, steps + 1):
            F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
            optimizer.step()
    loaded = events(tmp_path)
    shown = {tag: loaded.Images(tag) for tag in ("heatmap/grad_norm", "trajectory/path")}
    for images in shown.values():
        assert [image.step for image in images][-1] == steps
        assert len({image.step for image in images}) == len(images)
    first, last = (shown["heatmap/grad_norm"][i] for i in (0, -1))
    assert (first.step, len(shown["heatmap/grad_norm"])) == (5, 2)  # half a minute has not passed
    assert first.encoded_image_string != last.encoded_image_string
    ends = list(range(5, steps + 1, 5)) + [63] * (steps == 63)
    assert [entry["step"] for entry in read_history(tmp_path / "history.jsonl")] == ends


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("logs", [False, True])
def test_a_learning_rate_that_is_logged_replaces_the_optimizer_s(
    tmp_path: Path, logs: bool, after: bool
) -> None:
    model = classifier()
    groups = [{"params": [p], "lr": 0.01 * n} for n, p in enumerate(model.parameters(), 1)]
    optimizer = torch.optim.SGD(groups)
    with pyvizllm.watch(model, optimizer, tmp_path, every=2) as watch:
        for step in range(1, 5):
            model(torch.ones(1, 8)).sum().backward()
            if logs and not after:
                watch.log(learning_rate=9.0 * step)
            optimizer.step()
            if logs and after:
                watch.log(learning_rate=torch.tensor(9.0 * step))
    shown = [entry["scalars"] for entry in read_history(tmp_path / "history.jsonl")]
    rates = [scalars["train/learning_rate"] for scalars in shown]
    assert rates == ([18.0, 36.0] if logs else [0.01, 0.01])
    assert [scalars["learning_rate/group_1"] for scalars in shown] == [0.02, 0.02]
    assert not any("unless" in tag for scalars in shown for tag in scalars)


SCRIPT = """
    import os, signal, sys, time
    import torch
    import pyvizllm

    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = pyvizllm.watch(model, optimizer, sys.argv[1], every=2)
    for step in range(1, 100_000):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.log(loss=float(step))
        if step == 7:
            {end}
"""


def run(folder: Path, end: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(SCRIPT).format(end=end)
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_an_exception_in_a_thread_is_dumped_by_the_watch_that_it_trains(tmp_path: Path) -> None:
    """Of two threads that train, one fails, and so does one that does not train."""
    code = f"""
import threading, torch, pyvizllm
failed = threading.Event()
def train(name):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watches[name] = pyvizllm.watch(model, optimizer, {str(tmp_path)!r} + "/" + name, every=2)
    for step in range(1, 8):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        watches[name].log(loss=float(step))
    if name == "fails":
        raise ValueError("out of luck")
    if name == "ends":
        raise SystemExit
    failed.wait()
def load():
    raise OSError("no data")
watches = {{}}
threads = [threading.Thread(target=train, args=[name]) for name in ("fails", "ends", "goes on")]
threads.append(threading.Thread(target=load))
for thread in threads:
    thread.start()
for thread in (threads[0], threads[1], threads[3]):
    thread.join()
failed.set()
threads[2].join()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    ends = [line for line in done.stderr.splitlines() if line.endswith(("of luck", "no data"))]
    assert sorted(ends) == ["OSError: no data", "ValueError: out of luck"]
    dumped_and_told(tmp_path / "fails", "exception: ValueError('out of luck')")
    for name in ("fails", "ends", "goes on"):
        history = read_history(tmp_path / name / "history.jsonl")
        assert [entry["step"] for entry in history] == [2, 4, 6, 7]
        assert (tmp_path / name / "flight").exists() == (name == "fails")


def dumped_and_told(folder: Path, reason: str) -> Path:
    """The dump, which both files tell of."""
    (dump,) = (folder / "flight").glob("*.npz")
    assert load_flight(dump).reason == reason
    text = flight_text(dump, reason, 7)
    assert read_history(folder / "history.jsonl")[-1]["texts"]["flight"] == text
    (event,) = events(folder).Tensors("flight/text_summary")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (7, text)
    return dump


def test_an_exception_leaves_everything_and_a_dump(tmp_path: Path) -> None:
    done = run(tmp_path, "raise ValueError('out of luck')")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: out of luck"
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history] == [2, 4, 6, 7]
    assert history[-1]["scalars"]["train/loss"] == 7.0
    reason = "exception: ValueError('out of luck')"
    assert load_flight(dumped_and_told(tmp_path, reason)).steps.tolist() == list(range(1, 8))


def test_sigterm_leaves_everything_and_a_dump(tmp_path: Path) -> None:
    done = run(tmp_path, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == ""
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history] == [2, 4, 6, 7]
    assert load_flight(dumped_and_told(tmp_path, "SIGTERM")).steps.tolist() == list(range(1, 8))


def test_sigterm_while_closing_loses_nothing(tmp_path: Path) -> None:
    """A sink as slow as a disk of a network; the signal comes while `close` waits for it."""
    code = f"""
import os, signal, time, torch, pyvizllm
from pyvizllm.telemetry import HistorySink
class Slow(HistorySink):
    def write(self, publication):
        super().write(publication)
        time.sleep(0.1)
        if watch.publisher._closing and not signals:
            signals.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
signals = []
watch = pyvizllm.watch(
    model, optimizer, {str(tmp_path)!r}, every=1, histograms=(), sinks=[Slow()]
)
for step in range(10):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    watch.log(loss=float(step))
watch.close()
time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == ""
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history] == list(range(1, 11))
    scalars = events(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in scalars] == [(n + 1, n) for n in range(10)]


def test_watches_that_overlap_are_let_go(tmp_path: Path) -> None:
    kept: list[weakref.ref[object]] = []
    last = None
    for number in range(5):
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        watch = pyvizllm.watch(model, optimizer, tmp_path / str(number), every=1)
        model(batch(1)[0]).sum().backward()
        optimizer.step()
        kept += [weakref.ref(watch), weakref.ref(model[0].weight)]
        if last is not None:
            last.close()
        last = watch
    assert last is not None
    last.close()
    del last, watch, model, optimizer
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


def test_an_exit_without_close_leaves_everything(tmp_path: Path) -> None:
    assert run(tmp_path, "sys.exit(3)").returncode == 3
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history] == [2, 4, 6, 7]
    assert not (tmp_path / "flight").exists()
    assert json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])["step"] == 7


@pytest.mark.parametrize("error", [SystemExit(3), ValueError("out of luck")])
def test_leaving_the_block_by_sys_exit_is_no_failure(tmp_path: Path, error: BaseException) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(batch(1)[0]).sum().backward()

    def train() -> None:
        with pyvizllm.watch(model, optimizer, tmp_path, every=5):
            optimizer.step()
            raise error

    with pytest.raises(type(error)):
        train()
    assert [entry["step"] for entry in read_history(tmp_path / "history.jsonl")] == [1]
    assert (tmp_path / "flight").exists() == isinstance(error, ValueError)


def test_kill_9_leaves_what_was_published_a_second_ago(tmp_path: Path) -> None:
    done = run(tmp_path, "time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history] == [2, 4, 6]
    scalars = events(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in scalars] == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert np.isfinite([event.wall_time for event in scalars]).all()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_publisher_s_thread_gets_no_team_of_threads(tmp_path: Path) -> None:
    """OpenMP keeps one for each thread that computes in parallel; the training's then sleeps."""
    script = f"""
        import os, torch, pyvizllm
        torch.set_num_threads(2)
        model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(30)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        batch = torch.randn(4096, 32)
        model(batch).square().mean().backward()
        before = len(os.listdir("/proc/self/task"))
        with pyvizllm.watch(model, optimizer, {str(tmp_path)!r}, every=1) as watch:
            for _ in range(5):
                model(batch).square().mean().backward()
                optimizer.step()
                watch.publisher.flush(60)
            print(len(os.listdir("/proc/self/task")) - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1"]
