"""What is watched while models, optimizers and modes change in mid-training."""

from __future__ import annotations

import gc
import logging
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from watching import bins_of, norm, watching

import pyvizllm
from pyvizllm.telemetry import Publication, Publisher, read_history
from pyvizllm.telemetry.names import WatchedNames

# Of a distance seen through a sketch of few tensors, some of which matter most: 2 sigma.
SKETCH_ERROR = 0.18


class Gate:
    """What the publisher's thread stands before."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def wait(self) -> Publication | None:
        self._opened.wait(60)
        return None

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def backward(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(32, 8, generator=generator)
    loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
    loss.backward()
    return loss


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def last_scalars(folder: Path) -> dict[str, float]:
    entries = read_history(folder / "history.jsonl")
    return next(e["scalars"] for e in reversed(entries) if "trajectory/distance" in e["scalars"])


def moved(model: nn.Module, start: list[Tensor]) -> float:
    return norm([p - q for p, q in zip(model.parameters(), start, strict=True)])


def test_a_new_optimizer_over_the_same_model(tmp_path: Path) -> None:
    model = small_model()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = sgd(model)
    norms = []
    with pyvizllm.watch(model, None, tmp_path, every=10) as watch:
        for step in range(40):
            if step == 20:
                optimizer = sgd(model)  # the old one still lives while the new one is made
            optimizer.zero_grad()
            watch.log(loss=backward(model, step))
            norms.append(norm([p.grad for p in model.parameters() if p.grad is not None]))
            optimizer.step()
    scalars = last_scalars(tmp_path)
    assert scalars["trajectory/distance"] == pytest.approx(moved(model, start), rel=SKETCH_ERROR)
    assert scalars["train/grad_norm"] == pytest.approx(np.mean(norms[30:]), rel=1e-6)


def test_a_new_optimizer_whose_gradients_were_clipped() -> None:
    """Its first step is measured once, and before the clipping."""
    model = small_model()
    watch, seen = watching(model, None, every=4)
    norms = []
    for step in range(4):
        if step % 2 == 0:
            optimizer = sgd(model)
        optimizer.zero_grad()
        backward(model, step)
        norms.append(norm([model[0].weight.grad]))
        pyvizllm.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    watch.close()
    got = seen.statistic("grad", "sum_squares", "0.weight") ** 0.5
    np.testing.assert_allclose(got, norms, rtol=1e-6)
    assert seen.statistic("grad", "numel", "0.weight").tolist() == [128] * 4


def test_two_optimizers_that_take_turns() -> None:
    model = small_model()
    optimizers = [sgd(model), torch.optim.Adam(model.parameters())]
    watch, seen = watching(model, None, every=4)
    gradients = []
    for step in range(8):
        optimizer = optimizers[step % 2]
        optimizer.zero_grad()
        backward(model, step)
        gradients.append(model[0].weight.grad.clone())
        optimizer.step()
    watch.close()
    assert seen.published == [4, 8]
    for publication in (0, 1):
        expected = bins_of(gradients[4 * publication : 4 * publication + 4])
        np.testing.assert_array_equal(seen.counts(publication, "grad", "0.weight"), expected)
    norms = seen.statistic("grad", "sum_squares", "0.weight") ** 0.5
    np.testing.assert_allclose(norms, [norm([g]) for g in gradients], rtol=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_an_optimizer_that_begins_later(tmp_path: Path, known: bool) -> None:
    model = small_model()
    head, body = sgd(model[2]), sgd(model[0])
    start = [p.detach().clone() for p in model.parameters()]
    with pyvizllm.watch(model, [head, body] if known else None, tmp_path, every=10) as watch:
        for step in range(40):
            model.zero_grad()
            watch.log(loss=backward(model, step))
            head.step()
            if step >= 20:
                body.step()
    scalars = last_scalars(tmp_path)
    distance = moved(model, start)
    assert scalars["trajectory/distance"] == pytest.approx(distance, rel=SKETCH_ERROR)
    assert distance * 0.8 < scalars["trajectory/path_length"] < 2 * distance
    assert scalars["trajectory/update_cosine"] > 0.5


def test_optimizers_that_nobody_uses_any_more_are_let_go() -> None:
    model, other = small_model(), small_model(1)
    watch, _ = watching(model, None, every=2)
    gone: list[weakref.ref[torch.optim.Optimizer]] = []
    for step in range(6):
        for module in (other, model):
            optimizer = sgd(module)
            gone.append(weakref.ref(optimizer))
            backward(module, step)
            optimizer.step()
            del optimizer
    gc.collect()
    # Ours of the last two steps: which of them steps is seen in the next.
    assert [reference() is None for reference in gone].count(False) <= 2
    assert len(watch._recorder.blocks) == 1
    watch.close()


def test_a_parameter_that_is_replaced_and_a_module_that_is_added() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 1))
    watch, seen = watching(model, None, every=2)
    for step in range(6):
        if step == 2:  # more tokens
            model[0] = nn.Embedding(6, 8)
        if step == 4:
            model.append(nn.Linear(1, 1))
        if step % 2 == 0:
            optimizer = sgd(model)
        optimizer.zero_grad()
        model(torch.arange(4)).sum().backward()
        optimizer.step()
    watch.close()
    assert seen.names == ("0.weight", "1.weight", "1.bias", "2.weight", "2.bias")
    assert seen.statistic("grad", "numel", "0.weight").tolist() == [32, 32, 48, 48, 48, 48]
    assert seen.statistic("grad", "numel", "2.weight").tolist() == [0, 0, 0, 0, 1, 1]


def test_a_parameter_that_leaves_the_optimizer_stays_where_it_is(tmp_path: Path) -> None:
    model = small_model()
    optimizer = sgd(model)
    start = [p.detach().clone() for p in model.parameters()]
    with pyvizllm.watch(model, optimizer, tmp_path, every=10):
        for step in range(40):
            if step == 20:
                optimizer.param_groups[0]["params"] = list(model[2].parameters())
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    distance = last_scalars(tmp_path)["trajectory/distance"]
    assert distance == pytest.approx(moved(model, start), rel=SKETCH_ERROR)


def test_a_parameter_whose_data_changes_its_size(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 2, bias=False)
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=1)
    for size in (4, 4, 6):
        model.weight.grad = None
        model.weight.data = torch.ones(2, size)
        model(torch.ones(1, size)).sum().backward()
        optimizer.step()
    watch.close()
    assert seen.statistic("update", "numel", "weight").tolist() == [8, 8, 12]
    assert seen.statistic("update", "sum", "weight") == pytest.approx([-8e-3, -8e-3, -12e-3], 1e-3)
    assert not caplog.records


@pytest.mark.parametrize("first", ["evaluation", "training"])
def test_logging_in_inference_mode(first: str, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=4)

    def evaluate() -> None:
        with torch.inference_mode():
            watch.log({"quality/error": model(torch.ones(1, 8)).sum()})

    def train() -> None:
        watch.log({"quality/error": backward(model, 0)})
        optimizer.step()

    for action in (
        (evaluate, train, train, evaluate) if first == "evaluation" else (train, evaluate)
    ):
        action()
    watch.close()
    assert np.isfinite(seen.scalar("quality/error")).all()
    assert not caplog.records


def test_a_publication_in_the_middle_of_a_step_keeps_the_steps_before() -> None:
    """As SIGTERM's handler publishes, between the optimizer's two hooks."""
    model = small_model()
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=2)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    backward(model, 2)
    watch.before_step(optimizer, (), {})
    watch._on_shutdown("SIGTERM")
    watch.close()
    assert seen.published == [2]
    assert [len(steps) for steps in seen.steps if len(steps)] == [2]


NAMED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a child called module": (
        lambda: nn.ModuleDict({"module": nn.Linear(1, 1), "head": nn.Linear(1, 1)}),
        ["module.weight", "module.bias", "head.weight", "head.bias"],
    ),
    "wrapped": (
        lambda: nn.DataParallel(nn.Linear(1, 1)),
        ["weight", "bias"],
    ),
    "compiled": (
        lambda: torch.compile(nn.DataParallel(nn.Linear(1, 1))),
        ["weight", "bias"],
    ),
    "one tag": (
        lambda: nn.ParameterDict({key: nn.Parameter(torch.ones(1)) for key in ("a b", "a_b", "a")}),
        ["a", "a b", "a_b_2"],
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_names(name: str) -> None:
    make, names = NAMED[name]
    assert list(WatchedNames(make()).values()) == names


def test_a_publisher_that_is_behind_makes_intervals_longer(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost: neither a step nor a count."""
    model = small_model()
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=1)
    watch.publisher.submit(gate.wait)
    gradients = []
    for step in range(500):
        optimizer.zero_grad()
        backward(model, step)
        gradients.append(model[0].weight.grad.clone())
        optimizer.step()
    gate.open()
    watch.close()
    assert watch.publisher.dropped == 0
    assert sum(len(steps) for steps in seen.steps) == 500
    assert 10 < len(seen.published) < 100
    total = sum(h["grad"][0][seen.names.index("0.weight")] for h in seen.histograms if "grad" in h)
    np.testing.assert_array_equal(total, bins_of(gradients))
    assert not caplog.records


def test_what_is_dropped_is_told_once(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher([], queue_size=2)
    publisher.submit(gate.wait)
    for _ in range(8):
        publisher.submit(lambda: None)
    gate.open()
    publisher.close()
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        "Publisher: more comes than can be written, the oldest is dropped; "
        "pyvizllm/dropped counts how much"
    ]
    assert publisher.dropped >= 5


@pytest.mark.parametrize("order", ["evaluation first", "loss before", "loss after"])
def test_an_evaluation_is_of_the_parameters_as_they_are(tmp_path: Path, order: str) -> None:
    model = small_model()
    optimizer = sgd(model)
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    expected: dict[int, float] = {}

    def evaluate(step: int) -> None:
        with torch.no_grad():
            value = model(inputs).square().mean()
        for part in (value - 1, value + 1):  # of batches
            # A name whose first log comes before the first step is of the step that follows.
            other = {} if order == "evaluation first" else {"other/loss": part}
            watch.log({"eval/loss": part, **other})
        expected[step] = float(value)

    with pyvizllm.watch(model, optimizer, tmp_path, every=5) as watch:
        if order == "evaluation first":
            evaluate(0)
        for step in range(1, 21):
            optimizer.zero_grad()
            loss = backward(model, step)
            if order == "loss before":
                watch.log(loss=loss)
            optimizer.step()
            if order != "loss before":
                watch.log(loss=loss)
            if step in (5, 10, 12, 20):
                evaluate(step)
    entries = read_history(tmp_path / "history.jsonl")
    shown = {e["step"]: s for e in entries if (s := e["scalars"].get("eval/loss")) is not None}
    assert shown == pytest.approx(expected, rel=1e-6)
    if order != "evaluation first":
        others = {
            e["step"]: s for e in entries if (s := e["scalars"].get("other/loss")) is not None
        }
        assert others[5] == pytest.approx(expected[5], rel=1e-6)
        assert others[20] == pytest.approx(expected[20], rel=1e-6)


@pytest.mark.parametrize("ignore", [[], ["overfitting"], "overfitting"])
def test_overfitting_is_seen_in_evaluations_that_are_logged(
    tmp_path: Path, ignore: str | list[str]
) -> None:
    model = small_model()
    optimizer = sgd(model)
    with pyvizllm.watch(model, optimizer, tmp_path, every=10, ignore=ignore) as watch:
        for step in range(1, 201):
            backward(model, step)
            optimizer.step()
            watch.log(loss=1.0 / step)
            if step % 20 == 0:
                watch.log({"eval/loss": abs(step - 60) / 60 + 1})
    findings = [f for e in read_history(tmp_path / "history.jsonl") for f in e["findings"]]
    assert ("overfitting" in {finding["rule"] for finding in findings}) == (ignore == [])


# Dynamo asks every tensor that leaves a graph for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_loop_calls_us_as_we_are() -> None:
    model = small_model()
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=2)

    @torch.compile(backend="eager")
    def step(inputs: Tensor) -> Tensor:
        loss = model(inputs).square().mean()
        loss.backward()
        pyvizllm.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        watch.log(loss=loss)
        return loss

    losses = [float(step(torch.full((2, 8), float(n))).detach()) for n in range(4)]
    watch.close()
    np.testing.assert_allclose(seen.scalar("train/loss"), losses, rtol=1e-6)
    assert set(seen.stages) == {"before clipping"}


@pytest.mark.parametrize("where", ["within a step", "between steps"])
def test_sigterm_loses_no_step(tmp_path: Path, where: str) -> None:
    code = f"""
import os, signal, torch, pyvizllm
from pyvizllm.telemetry.recorder import Recorder
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
measure, calls = Recorder.find_nonfinite, []
def interrupted(self, *arguments):
    measure(self, *arguments)
    calls.append(1)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGTERM)
if {where == "within a step"}:
    Recorder.find_nonfinite = interrupted
watch = pyvizllm.watch(model, optimizer, {str(tmp_path)!r})
for step in range(1, 100):
    loss = model(torch.ones(1, 4)).sum()
    loss.backward()
    optimizer.step()
    watch.log(loss=loss)
    if {where == "between steps"} and step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert ended.returncode == -signal.SIGTERM
    (entry,) = read_history(tmp_path / "history.jsonl")
    assert entry["step"] == 6
    assert np.isfinite(entry["scalars"]["train/loss"])
