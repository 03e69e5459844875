"""What a loop may say to a watch, and how it ends: odd values, exceptions, signals, wrappers."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from watching import watching

import pyvizllm
from pyvizllm.telemetry import read_history, step_buffer
from pyvizllm.telemetry.flight_recorder import load_flight
from pyvizllm.telemetry.host_copies import HostCopies


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=1e-2)


def backward(model: nn.Module) -> Tensor:
    loss = model(torch.ones(1, 4)).sum()
    loss.backward()
    return loss


def test_metrics_and_sizes_are_checked_where_they_are_given(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Linear(4, 1)
    watch, _ = watching(model, [sgd(model)])
    for odd in (None, 1.0, torch.zeros(53)):
        with pytest.raises(TypeError, match="expected the CrossEntropyMetrics that a loss"):
            watch.log_metrics(odd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected size of 64 bits, got 1180591620717411303424"):
        watch.micro_batch(1.0, size=2**70)
    watch.close()
    assert not caplog.records


def test_what_is_logged_is_shown_though_no_optimizer_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters that a loop changes by itself: it is told that there are no steps to see."""
    model = nn.Linear(4, 1)
    with (
        caplog.at_level(logging.WARNING, logger="pyvizllm"),
        pyvizllm.watch(model, logdir=tmp_path, every=2) as watch,
    ):
        for step in range(6):
            backward(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            watch.log(loss=float(step))
    assert watch.step == 0
    (line,) = read_history(tmp_path / "history.jsonl")
    assert line["step"] == 1
    assert line["scalars"]["train/loss"] == 2.5
    assert [record.message for record in caplog.records] == [
        "watch: no optimizer of the model's parameters has stepped; the mean of all that was "
        "logged is shown as step 1"
    ]


class Outer(torch.optim.Optimizer):
    """As SAM's (Foret et al., 2021): its own step is not called, but that of the one within."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)


@pytest.mark.parametrize("given", [True, False])
def test_an_optimizer_whose_own_step_is_not_called(
    given: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 1)
    optimizer = Outer(model.parameters())
    with pyvizllm.watch(model, optimizer if given else None, tmp_path) as watch:
        for step in range(6):
            backward(model)
            optimizer.base.step()
            watch.log(loss=float(step))
    assert watch.step == (0 if given else 6)
    assert [record.message for record in caplog.records] == (
        [
            "watch: none of the given optimizers has stepped (without, those that do are found); "
            "the mean of all that was logged is shown as step 1"
        ]
        if given
        else []
    )


@pytest.mark.parametrize("every", [2, 50])
def test_the_loss_of_a_step_that_never_came_is_shown(every: int, tmp_path: Path) -> None:
    """After the steps that are still to be published: a smaller number would be a resumed run."""
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    watch = pyvizllm.watch(model, optimizer, tmp_path, every=every)
    for step in range(1, 4):
        watch.log(loss=float(step))
        backward(model)
        if step < 3:
            optimizer.step()
    watch.close()
    assert watch.step == 2
    losses = {
        line["step"]: line["scalars"]["train/loss"]
        for line in read_history(tmp_path / "history.jsonl")
    }
    assert losses == {2: 1.5, 3: 3.0}


def test_metrics_of_a_step_that_never_came_are_shown(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    watch = pyvizllm.watch(model, sgd(model), tmp_path)
    logits, targets = torch.eye(3) * 9, torch.tensor([0, 1, 0])
    for _ in range(2):
        _, metrics = pyvizllm.cross_entropy(logits, targets, return_metrics=True)
        watch.log_metrics(metrics)
    watch.close()
    (line,) = read_history(tmp_path / "history.jsonl")
    assert line["scalars"]["train/accuracy"] == pytest.approx(2 / 3)
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert line["scalars"]["train/loss"] == pytest.approx(expected)


def test_what_a_loop_logs_is_shown_though_it_is_measured_too(tmp_path: Path) -> None:
    """torch's clipping returns the norm before it, what the optimizer gets has that after it: each
    has its own curve, as the stage that is told is that of what is measured."""
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    with pyvizllm.watch(model, optimizer, tmp_path, every=1) as watch:
        backward(model)
        before = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        watch.log(grad_norm=before)
    (line,) = read_history(tmp_path / "history.jsonl")
    assert line["scalars"]["train/logged_grad_norm"] == pytest.approx(5**0.5)
    assert line["scalars"]["train/grad_norm"] == pytest.approx(0.01)


def test_the_path_survives_parameters_that_come_when_others_are_nan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = sgd(model[0])
    with pyvizllm.watch(model, optimizer, tmp_path, every=1) as watch:
        for step in range(8):
            if step == 4:
                optimizer.add_param_group({"params": list(model[1].parameters())})
            loss = backward(model)
            if step == 3:
                model[0].weight.grad[0, 0] = torch.nan
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss)
    assert not any("Trajectory" in record.message for record in caplog.records)
    with np.load(tmp_path / "trajectory.npz") as saved:
        assert saved["steps"].tolist() == [0, 1, 2, 3]
        assert np.isfinite(saved["path"]).all()


def test_micro_batches_are_handed_over_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each copy has pinned memory and an event of its own."""
    copies: list[int] = []

    class Counting(HostCopies[Any]):
        def __init__(self, tensors: Any) -> None:
            copies.append(len(tensors))
            super().__init__(tensors)

    monkeypatch.setattr(step_buffer, "HostCopies", Counting)
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=10)
    losses, norms, sizes = np.zeros((10, 8)), np.zeros((10, 8)), np.zeros((10, 8))
    for step in range(10):
        for micro_batch in range(8):
            losses[step, micro_batch] = float(backward(model).detach())
            norms[step, micro_batch] = sum(float(p.grad.square().sum()) for p in model.parameters())
            sizes[step, micro_batch] = size = 100 * step + micro_batch
            loss = torch.tensor([losses[step, micro_batch]])  # [1] is a scalar, too
            watch.micro_batch(loss, size=torch.tensor(size) if micro_batch % 2 else int(size))
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    (steps,) = seen.steps
    np.testing.assert_allclose(steps.micro_batches.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(steps.micro_batches.squared_norms, norms, rtol=1e-6)
    np.testing.assert_array_equal(steps.micro_batches.sizes, sizes)
    assert copies[0] <= 5


class Odd:
    def __repr__(self) -> str:
        raise KeyError("no name")


@pytest.mark.parametrize("size", [torch.nan, torch.inf, 1e30, 12.0])
def test_a_tensor_that_holds_no_size_costs_no_step(size: float) -> None:
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=2)
    for step in range(2):
        watch.micro_batch(backward(model), size=torch.tensor(size if step else 3.0))
        optimizer.step()
    watch.close()
    (steps,) = seen.steps
    assert steps.micro_batches.sizes[:, 0].tolist() == [3, 12 if size == 12.0 else -1]


def test_sample_ids_are_copies_of_what_json_can_hold(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=9)
    tensor, array, listed = torch.arange(3), np.arange(3), [0, 1, 2]
    loop: list[Any] = [1]
    loop.append(loop)
    given: list[Any] = [tensor, array, listed, {(1, 2): tensor}, {"a": Path("b")}, Odd(), loop]
    for ids in given:
        watch.micro_batch(backward(model), sample_ids=ids)
        optimizer.step()
    tensor += 7  # as a loader does that fills its buffer again
    array += 7
    listed[0] = 7
    watch.close()
    ids = [step[0] for step in seen.steps[0].micro_batches.sample_ids]
    assert [ids[0].tolist(), ids[1].tolist(), ids[2]] == [[0, 1, 2]] * 3
    assert ids[3]["(1, 2)"].tolist() == [0, 1, 2]
    assert ids[4] == {"a": repr(Path("b"))}
    assert ids[5] == "Odd that cannot be shown: KeyError"
    assert json.dumps(ids[4:])
    assert watch.step == len(given)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_one_id_that_raises_leaves_the_flight_whole(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    with (
        contextlib.suppress(ArithmeticError),
        pyvizllm.watch(model, optimizer, tmp_path) as watch,
    ):
        for ids in ({(1, 2): 3}, Odd(), [5]):
            watch.micro_batch(backward(model), sample_ids=ids)
            optimizer.step()
        raise ArithmeticError
    (path,) = (tmp_path / "flight").glob("*.npz")
    flight = load_flight(path)
    assert flight.sample_ids == [[{"(1, 2)": 3}], ["Odd that cannot be shown: KeyError"], [[5]]]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_a_thread_logs_does_not_hang(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    watch = pyvizllm.watch(model, optimizer, tmp_path)
    held, forked = threading.Event(), threading.Event()

    def log() -> None:
        with watch._lock:
            held.set()
            assert forked.wait(60)

    def child() -> None:
        watch.log(loss=1.0)
        backward(model)
        optimizer.step()
        watch.close()

    thread = threading.Thread(target=log)
    thread.start()
    assert held.wait(60)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    forked.set()
    thread.join()
    process.join(30)
    process.kill()  # one that hangs would keep pytest itself from ending
    process.join()
    assert process.exitcode == 0
    watch.log(loss=2.0)
    optimizer.step()
    watch.close()
    assert [e["step"] for e in read_history(tmp_path / "history.jsonl")][-1] == 1


def loss_of(step: int) -> float:
    return float("nan") if step == 4 else float(step)


@pytest.mark.parametrize("raised", ["forward", "step", "after a step"])
def test_the_step_that_raises_is_in_the_history_and_in_the_flight(
    tmp_path: Path, raised: str
) -> None:
    """Its loss, which is often why."""
    model = nn.Linear(4, 1)
    optimizer = sgd(model)

    def fail(*_: Any) -> None:
        if raised == "step" and watch.step == 3:
            raise ArithmeticError

    with (
        contextlib.suppress(ArithmeticError),
        pyvizllm.watch(model, optimizer, tmp_path) as watch,
    ):
        optimizer.register_step_pre_hook(fail)
        for step in range(1, 6):
            backward(model)
            watch.log(loss=loss_of(step))
            if raised == "forward" and step == 4:
                raise ArithmeticError
            optimizer.step()
            optimizer.zero_grad()
            if raised == "after a step" and step == 4:
                raise ArithmeticError
    flights = [load_flight(path) for path in (tmp_path / "flight").glob("*.npz")]
    (flight,) = [f for f in flights if f.reason == "exception: ArithmeticError"]
    assert flight.steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(flight.losses, [1, 2, 3, np.nan])
    (*_, last) = read_history(tmp_path / "history.jsonl")
    assert last["step"] == 4
    assert np.isnan(last["scalars"]["train/loss"])


def test_a_signal_whose_handler_goes_on_loses_nothing(tmp_path: Path) -> None:
    """It comes in the middle of step 3, of which the loss has been logged."""
    goes_on: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: goes_on.append(number))
    try:
        model = nn.Linear(4, 1)
        optimizer = sgd(model)
        watch, seen = watching(model, [optimizer], every=100)
        for step in range(1, 6):
            loss = backward(model)
            watch.log({"loss": float(step), "own/tensor": torch.tensor(2.0 * step)})
            watch.micro_batch(loss, size=step, sample_ids=[step])
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            optimizer.step()
        watch.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert goes_on == [signal.SIGTERM]
    assert seen.published == [2, 5]
    assert seen.scalar("train/loss").tolist() == [1, 2, 3, 4, 5]
    assert seen.scalar("own/tensor").tolist() == [2, 4, 6, 8, 10]
    sizes = np.concatenate([steps.micro_batches.sizes[:, 0] for steps in seen.steps])
    assert sizes.tolist() == [1, 2, 3, 4, 5]
    assert (seen.statistic("grad", "numel", "weight") == 4).all()
    assert seen.counts(1, "grad", "weight").sum() == 3 * 4


def test_a_signal_waits_for_the_outermost_of_our_calls() -> None:
    """Sample ids may call the watch when they are shown, in the middle of a micro-batch's call."""
    passed_on: list[int] = []

    class Talkative:
        def __repr__(self) -> str:
            watch.log({"own/asked": 1.0})
            signal.raise_signal(signal.SIGTERM)
            return f"passed on {len(passed_on)} times"

    before = signal.signal(signal.SIGTERM, lambda number, frame: passed_on.append(number))
    try:
        model = nn.Linear(4, 1)
        optimizer = sgd(model)
        watch, seen = watching(model, [optimizer], every=100)
        watch.micro_batch(backward(model), size=1, sample_ids=Talkative())
        assert passed_on == [signal.SIGTERM]
        optimizer.step()
        watch.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    (steps,) = seen.steps
    assert steps.micro_batches.sample_ids == [["passed on 0 times"]]


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer that is not set up as one, around another one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Unhooked(Accelerated):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups


@pytest.mark.parametrize("known", [True, False])
def test_a_wrapper_that_was_not_set_up_as_an_optimizer(tmp_path: Path, known: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = Accelerated(Accelerated(sgd(model)))
    with pyvizllm.watch(model, optimizer if known else None, tmp_path, every=1) as watch:
        for _ in range(3):
            backward(model)
            optimizer.step()
    assert watch.step == 3
    (*_, last) = read_history(tmp_path / "history.jsonl")
    assert last["scalars"]["grad_norm/weight"] == pytest.approx(3 * 2.0)


def test_an_optimizer_without_hooks_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    threads = threading.active_count()
    with pytest.raises(TypeError, match="expected optimizers that call step hooks, got Unhooked"):
        pyvizllm.watch(model, Unhooked(sgd(model)), tmp_path / "run")
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_training_that_raises_dumps_its_last_steps(
    tmp_path: Path, error: type[BaseException]
) -> None:
    model = nn.Linear(4, 3)
    steps: list[int] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        steps.append(len(steps) + 1)
        if len(steps) == 6:
            raise error
        return model(batch).square().mean()

    with pytest.raises(error):
        pyvizllm.train(
            model, [torch.ones(2, 4)] * 9, loss_fn=loss_fn, output_dir=tmp_path, logging_steps=2
        )
    (path,) = tmp_path.glob("*/flight/*.npz")
    flight = load_flight(path)
    assert flight.reason == f"exception: {error.__name__}"
    assert flight.steps.tolist() == [1, 2, 3, 4, 5]
    assert np.isfinite(flight.losses).all()


def test_what_has_no_name_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pyvizllm.watch(model, torch.optim.SGD(model.parameters()), tmp_path, every=1) as watch:
        for values in (0.3, 0, torch.ones(()), [("loss", 1.0)], {"loss"}):
            kind = type(values).__name__
            with pytest.raises(TypeError, match=f"^Watch.log: expected values by .*, got {kind}$"):
                watch.log(values)
        with pytest.raises(TypeError, match=r"^Watch.log: expected names that are strings, got 1$"):
            watch.log({1: 2.0})


def test_one_kind_of_histograms_and_nothing_to_ignore(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    options = {"every": 1, "histograms": "grad", "ignore": None}
    with pyvizllm.watch(model, optimizer, tmp_path, **options):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["histograms"]
    expected = {f"grad{axis}/{name}" for axis in ("", "_log10") for name in ("weight", "bias")}
    assert set(tags) == expected


def test_a_watch_says_where_its_run_is(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    watch = pyvizllm.watch(model, optimizer, tmp_path / "a'b", start_step=4)
    optimizer.step()
    folder = repr(str(tmp_path / "a'b"))
    assert repr(watch) == f"<Watch: step 5, logdir {folder}>"
    watch.close()
    assert repr(watch) == f"<Watch: step 5, closed, logdir {folder}>"
