"""Real small trainings, with their losses, gradients and events checked against torch."""

import io
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy
from pyvizllm.ops.cross_entropy_autograd import is_one
from pyvizllm.training import TrainResult, train

CLASSES = 5


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., TrainResult]:
    """`train` into the test's own folder, without a progress bar."""

    def call(*args: Any, **options: Any) -> TrainResult:
        return train(*args, **{"output_dir": tmp_path, "disable_tqdm": True, **options})

    return call


def classifier(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def examples(count: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))


def token_batches(sizes: list[int], ignored: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Batches of sequences [rows, 4, 6] with targets [rows, 4], the first few of them ignored."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for rows, count in zip(sizes, ignored, strict=True):
        inputs = torch.randn(rows, 4, 6, generator=generator)
        targets = torch.randint(CLASSES, (rows, 4), generator=generator)
        targets.view(-1)[:count] = -100
        batches.append((inputs, targets))
    return batches


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "histograms": 0})
    return accumulator.Reload()


def test_digits(fit: Callable[..., TrainResult]) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)  # the accuracy depends on the weights at the start, as with torch's AdamW
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    result = fit(
        model,
        TensorDataset(images[:1400], labels[:1400]),
        TensorDataset(images[1400:], labels[1400:]),
        num_train_epochs=8,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=1e-2,
        logging_steps=50,
    )
    with torch.no_grad():
        logits = model(images[1400:])
    accuracy = (logits.argmax(1) == labels[1400:]).double().mean().item()
    assert accuracy > 0.9
    assert result.metrics["eval/accuracy"] == pytest.approx(accuracy)
    assert result.metrics["eval/loss"] == pytest.approx(
        F.cross_entropy(logits, labels[1400:]).item(), rel=1e-5
    )
    assert result.metrics["train/loss"] < 0.1 * result.history[0]["train/loss"]
    steps = [entry["step"] for entry in result.history]
    assert steps == [*range(50, 351, 50), 352, 352]  # the rest of the interval; the evaluation


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_accumulation_is_one_big_batch(
    fit: Callable[..., TrainResult], optim: str, label_smoothing: float
) -> None:
    # Unequal rows and ignored targets: 3, 19, 4 and 0 of 4, 20, 4 and 8 targets count. A mean of
    # means would weigh the 3 like the 19, and be NaN for the last.
    batches = token_batches([1, 5, 1, 2], [1, 1, 0, 8])
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    models = [classifier(), classifier()]
    for model, data, steps in [(models[0], batches, 4), (models[1], [whole], 1)]:
        fit(
            model,
            data,
            max_steps=3,
            gradient_accumulation_steps=steps,
            optim=optim,
            learning_rate=0.1,
            label_smoothing_factor=label_smoothing,
            save_steps=0,
        )
    reference = classifier()
    for ours, other, start in zip(*(m.parameters() for m in (*models, reference)), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
        assert (ours - start).abs().max() > 1e-2


def test_one_sgd_step_is_torchs(fit: Callable[..., TrainResult]) -> None:
    [(inputs, targets)] = token_batches([6], [5])
    model, reference = classifier(), classifier()
    result = fit(
        model,
        [(inputs, targets)],
        max_steps=1,
        optim="sgd",
        momentum=0.0,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.01,
        logging_steps=1,
    )
    logits = reference(inputs).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten())
    loss.backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.5 * theirs.grad, rtol=1e-5, atol=1e-7)
    assert norm > 0.02  # clipping did something
    metrics = result.metrics
    assert metrics["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)  # before clipping
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["train/perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    counted = targets.flatten() != -100
    correct = (logits.argmax(1) == targets.flatten())[counted].double().mean().item()
    assert metrics["train/accuracy"] == pytest.approx(correct)


@pytest.mark.parametrize("telemetry", [True, False])
def test_clipping_off_and_telemetry_off(fit: Callable[..., TrainResult], telemetry: bool) -> None:
    clipped, free = classifier(), classifier()
    options: dict[str, Any] = {
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 1.0,
        "telemetry": telemetry,
        "logging_steps": 1,
    }
    result = fit(clipped, examples(64), max_grad_norm=1e-3, **options)
    assert "train/grad_norm" in result.metrics
    assert {"train/loss", "train/accuracy", "train/learning_rate"} <= result.metrics.keys()
    assert ("grad_norm/0.weight" in result.metrics) == telemetry
    fit(free, examples(64), max_grad_norm=0.0, **options)
    moves = []
    for model in (clipped, free):
        pairs = zip(model.parameters(), classifier().parameters(), strict=True)
        moves.append(sum((a - b).square().sum().item() for a, b in pairs) ** 0.5)
    # Momentum 0.9 over 4 steps of a norm of 1e-3 and a falling rate moves at most 1e-2.
    assert moves[0] < 1e-2 < 0.3 < moves[1]


def test_events_hold_the_contracts_tags(fit: Callable[..., TrainResult]) -> None:
    result = fit(
        classifier(),
        examples(40),
        examples(10),
        max_steps=5,
        logging_steps=2,
        eval_steps=2,
        learning_rate=0.1,
        warmup_steps=1,
        lr_scheduler_type="linear",
    )
    read = events(result.run_dir)
    scalars = set(read.Tags()["scalars"])
    names = [name for name, _ in classifier().named_parameters()]
    train_tags = ["loss", "accuracy", "perplexity", "entropy", "grad_norm", "learning_rate"]
    assert {f"train/{tag}" for tag in [*train_tags, "tokens_per_second"]} <= scalars
    assert {f"eval/{tag}" for tag in ["loss", "accuracy", "perplexity", "entropy"]} <= scalars
    assert {f"grad_norm/{name}" for name in names} <= scalars
    assert set(read.Tags()["histograms"]) == {
        f"{kind}{axis}/{name}"
        for kind in ("grad", "param", "update")
        for axis in ("", "_log10")
        for name in names
    }
    rates = [(event.step, event.value) for event in read.Scalars("train/learning_rate")]
    # Step s runs at linear(s - 1): the steps 2, 4 and 5 of 5 after 1 of warm-up.
    assert rates == [(2, pytest.approx(0.1)), (4, pytest.approx(0.05)), (5, pytest.approx(0.025))]
    assert [event.step for event in read.Scalars("eval/loss")] == [2, 4, 5]
    # 8 examples a step, 48 weights, 2 steps: every gradient of every step is in the histogram.
    histogram = read.Histograms("grad/0.weight")[0]
    assert (histogram.step, histogram.histogram_value.num) == (2, 96)
    text = (result.run_dir / "history.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["scalars"]["train/loss"] for line in lines if "train/loss" in line["scalars"]]
    assert losses == [entry["train/loss"] for entry in result.history if "train/loss" in entry]
    config = json.loads((result.run_dir / "config.json").read_text())
    assert (config["max_steps"], config["warmup_steps"]) == (5, 1)


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def loss_with_metrics(model: nn.Module, batch: Any) -> tuple[Tensor, CrossEntropyMetrics]:
    return cross_entropy(model(batch["x"]), batch["labels"], return_metrics=True)


@pytest.mark.parametrize("loss_fn", [mean_loss, loss_with_metrics])
def test_user_loss(fit: Callable[..., TrainResult], loss_fn: Any) -> None:
    batches = [(inputs.flatten(0, 1), y.flatten()) for inputs, y in token_batches([1, 5], [2, 1])]
    dicts = [{"x": inputs, "labels": targets} for inputs, targets in batches]
    ours, own = classifier(), classifier()
    options: dict[str, Any] = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
    }
    expected = fit(ours, batches, batches, **options)
    result = fit(own, dicts, dicts, loss_fn=loss_fn, **options)
    for one, other in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for tag in ("train/loss", "eval/loss"):
        assert result.metrics[tag] == pytest.approx(expected.metrics[tag], rel=1e-5)
    assert ("train/accuracy" in result.metrics) == (loss_fn is loss_with_metrics)


def test_regression_loss_weighs_examples(fit: Callable[..., TrainResult]) -> None:
    inputs, targets = torch.randn(7, 6), torch.randn(7, CLASSES)
    parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]

    def squared_error(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    ours, whole = classifier(), classifier()
    options: dict[str, Any] = {"loss_fn": squared_error, "optim": "sgd", "learning_rate": 0.1}
    fit(ours, parts, max_steps=2, gradient_accumulation_steps=2, **options)
    fit(whole, [(inputs, targets)], max_steps=2, **options)
    for one, other in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_user_optimizer_and_schedule(fit: Callable[..., TrainResult]) -> None:
    model = classifier()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    result = fit(
        model,
        examples(64),
        optimizer=optimizer,
        lr_scheduler=schedule,
        max_steps=5,
        logging_steps=1,
    )
    rates = [entry["train/learning_rate"] for entry in result.history]
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05])
    assert optimizer.state[next(model.parameters())]["step"] == 5
    # Without a scheduler the configured one goes over the optimizer's own rate.
    model = classifier()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.2)
    result = fit(
        model,
        examples(64),
        optimizer=optimizer,
        lr_scheduler_type="linear",
        max_steps=4,
        logging_steps=1,
    )
    rates = [entry["train/learning_rate"] for entry in result.history]
    assert rates == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_evaluation_weighs_tokens_and_leaves_no_trace(fit: Callable[..., TrainResult]) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))

    batches = token_batches([1, 5, 2], [3, 1, 8])
    quiet, watched = build(), build()
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.1}
    fit(quiet, batches, **options)
    quiet_rng = torch.rand(1)
    shuffled = DataLoader(examples(10), batch_size=4, shuffle=True)  # draws random numbers
    fit(watched, batches, shuffled, eval_steps=1, **options)
    assert torch.equal(torch.rand(1), quiet_rng)
    for one, other in zip(quiet.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(module.training for module in watched.modules())

    result = fit(build(), batches, batches, **options)
    model = build()
    model.load_state_dict(torch.load(result.checkpoint / "model.pt", weights_only=True))
    logits = torch.cat([model.eval()(inputs).flatten(0, 1) for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    loss = F.cross_entropy(logits, targets).item()
    counted = targets != -100
    probabilities = logits[counted].softmax(1)
    assert result.metrics["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert result.metrics["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.metrics["eval/accuracy"] == pytest.approx(
        (logits.argmax(1) == targets)[counted].double().mean().item()
    )
    assert result.metrics["eval/entropy"] == pytest.approx(
        -(probabilities * probabilities.log()).sum(1).mean().item(), rel=1e-5
    )


def test_bf16_autocast(fit: Callable[..., TrainResult]) -> None:
    seen = set()
    model = classifier()
    model[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    options: dict[str, Any] = {"max_steps": 40, "learning_rate": 1e-2}
    result = fit(model, examples(64), bf16=True, **options)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    full = fit(classifier(), examples(64), **options)
    assert result.metrics["train/loss"] < result.history[0]["train/loss"] - 0.2
    assert result.metrics["train/loss"] == pytest.approx(full.metrics["train/loss"], rel=0.02)


def test_whole_model_in_bf16_keeps_the_weights_of_tokens_exact(
    fit: Callable[..., TrainResult],
) -> None:
    # 1/3 is not a bf16 number: were it rounded on its way back, the gradient would be off by 2^-9.
    inputs = torch.randn(3, 6, dtype=torch.bfloat16)
    targets = torch.tensor([0, 1, 2])
    model = nn.Linear(6, CLASSES).bfloat16()
    with torch.no_grad():
        model.weight.zero_()
    seen = []

    def keep(gradient: Tensor) -> None:
        seen.append(gradient.clone())

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(keep)

    model.register_forward_hook(watch)
    model.bias.data.zero_()
    fit(model, [(inputs, targets)], max_steps=1)
    expected = (torch.full((3, CLASSES), 1 / CLASSES) - F.one_hot(targets, CLASSES)) / 3
    assert torch.equal(seen[0], expected.bfloat16())


def test_no_device_value_is_read_in_a_step(
    fit: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    inside = False

    def guard(name: str) -> None:
        original = getattr(Tensor, name)

        def guarded(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            here = inside and threading.current_thread() is threading.main_thread()
            if here and caller is not is_one.__code__:  # which reads what is on the CPU alone
                reads.append(f"{name} in {caller.co_filename}")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, guarded)

    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__"):
        guard(name)

    def batches() -> Any:
        nonlocal inside
        for batch in token_batches([2, 3, 2, 3, 2, 3], [1] * 6):
            inside = True  # from the first batch on, with everything up to the end of the data
            yield batch
        inside = False

    result = fit(
        classifier(),
        batches(),
        gradient_accumulation_steps=2,
        logging_steps=1,
        lr_scheduler_type="constant",
    )
    assert not inside
    assert reads == []
    assert len(result.history) == 3
    inside = True
    torch.tensor(1).item()  # the guard does see a read
    inside = False
    assert len(reads) == 1


def test_exception_leaves_readable_events(fit: Callable[..., TrainResult], tmp_path: Path) -> None:
    class Stop(BaseException):
        """Like KeyboardInterrupt, which pytest would take for its own."""

    calls = 0

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stop
        return F.cross_entropy(model(batch[0]), batch[1])

    threads = threading.active_count()
    with pytest.raises(Stop):
        fit(classifier(), examples(64), loss_fn=interrupted, logging_steps=2, run_name="run")
    assert threading.active_count() == threads
    read = events(tmp_path / "run")
    # Steps 1 and 2 in the first publication, step 3 in what the exception cut short.
    assert [event.step for event in read.Scalars("train/loss")] == [2, 3]
    assert read.Histograms("grad/0.weight")[1].histogram_value.num == 48


def test_nonfinite_gradients_are_shown_and_warned_of_once(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    inputs, targets = examples(8).tensors
    bad = inputs.clone()
    bad[0, 0] = math.nan
    data = [(inputs, targets), (bad, targets), (inputs, targets)]
    with caplog.at_level(logging.WARNING, logger="pyvizllm"):
        result = fit(classifier(), data, logging_steps=1)
    assert [math.isnan(entry["train/loss"]) for entry in result.history] == [False, True, True]
    assert [entry["health/nans"] > 0 for entry in result.history] == [False, True, True]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith(
        "pyvizllm: serious (step 2, non_finite): the loss was already nan, and the gradient of "
        "2.bias was the first that was not finite (flat index 0), of 4 that were not. "
        "Look at the inputs and targets of that batch first"
    )
    assert (result.run_dir / "flight" / "step-2-non_finite.npz").is_file()
    assert caplog.records[0].threadName == "pyvizllm-publisher"


def test_window_without_targets_changes_nothing(fit: Callable[..., TrainResult]) -> None:
    model = classifier()
    fit(model, token_batches([2, 2], [8, 8]), optim="sgd", max_steps=2)
    for ours, start in zip(model.parameters(), classifier().parameters(), strict=True):
        assert torch.equal(ours, start)


def test_micro_batch_without_targets_does_not_hide_the_loss_of_the_others(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    batches = [(x.flatten(0, 1), y.flatten()) for x, y in token_batches([2, 1, 2], [8, 1, 8])]
    dicts = [{"x": inputs, "labels": targets} for inputs, targets in batches]
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "logging_steps": 1, "max_steps": 2}
    expected = fit(classifier(), batches, **options).history
    shown = fit(classifier(), dicts, loss_fn=mean_loss, **options).history
    assert shown[0]["train/loss"] == pytest.approx(expected[0]["train/loss"], rel=1e-5)
    # The second window holds nothing that counts, and no number would be true.
    assert math.isnan(shown[1]["train/loss"])
    assert math.isnan(expected[1]["train/loss"])


def test_gradients_of_a_compiled_model_are_watched(fit: Callable[..., TrainResult]) -> None:
    """Hooks on parameters may be compiled away; `grad` at the end of a step may not."""
    torch._dynamo.reset()
    plain, compiled = classifier(), torch.compile(classifier(), backend="aot_eager")
    options: dict[str, Any] = {"max_steps": 3, "logging_steps": 3}
    expected = fit(plain, examples(24), **options)
    result = fit(compiled, examples(24), **options)
    shown = {k: v for k, v in result.metrics.items() if "grad_" in k}
    # Four parameters, two layers, and the mean and the largest norm of all together.
    assert len(shown) == 8
    for tag, value in shown.items():
        assert value == pytest.approx(expected.metrics[tag], rel=1e-5)
    assert events(result.run_dir).Histograms("grad/0.weight")[0].histogram_value.num == 144


def test_an_optimizer_over_more_than_the_model(fit: Callable[..., TrainResult]) -> None:
    temperature = nn.Parameter(torch.ones(()))
    model = classifier()
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.0)
    temperature.grad = torch.tensor(7.0)  # left behind by whoever used it before
    seen = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(temperature.grad)
        return F.cross_entropy(model(batch[0]) * temperature, batch[1])

    fit(model, examples(24), loss_fn=loss_fn, optimizer=optimizer)
    assert seen == [None, None, None]


def test_evaluation_does_not_slow_the_tokens_per_second(fit: Callable[..., TrainResult]) -> None:
    class Slow(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            time.sleep(0.5)
            return super().__getitem__(index)

    slow = Slow(*examples(2).tensors)
    result = fit(classifier(), examples(80), slow, eval_steps=4, logging_steps=5)
    rate = result.history[-2]["train/tokens_per_second"]  # steps 6 to 10, and an evaluation
    assert rate > 40


def test_torchs_class_dimension_and_tied_frozen_parameters(
    fit: Callable[..., TrainResult],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 8, 1), nn.Conv1d(8, CLASSES, 1))
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    inputs, targets = torch.randn(2, 6, 4), torch.randint(CLASSES, (2, 4))
    expected = F.cross_entropy(model(inputs), targets).item()
    result = fit(model, [(inputs, targets)], max_steps=1, logging_steps=1)
    assert result.metrics["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model[0].weight, frozen)
    assert "grad_norm/0.weight" not in result.metrics


def test_progress_bar(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train(classifier(), examples(24), examples(8), output_dir=tmp_path, logging_steps=1)
    shown = capfd.readouterr()
    assert "3/3" in shown.err
    assert "loss=" in shown.err
    assert "tokens/s=" in shown.err
    assert "step 3: eval loss" in shown.err
    assert shown.out == ""


def test_findings_are_written_above_the_bar_once(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class WithUnused(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*classifier())
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)))

    inputs, targets = examples(8).tensors
    bad = torch.full_like(inputs, math.nan)
    data = [(inputs, targets)] * 60 + [(bad, targets)]
    train(WithUnused(), data, num_train_epochs=1, output_dir=tmp_path, logging_steps=10)
    # "\r" redraws the bar, and goes before the line that is written above it.
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    told = [line for line in lines if "(step" in line]
    assert [line.partition(":")[0] for line in told] == [
        "warning (step 50, unused_parameters)",
        "serious (step 61, non_finite)",
    ]
    assert ", of 4 that were not. Look at the inputs and targets of that batch first" in told[1]
    assert not caplog.records  # or it would be there twice


def test_steps_in_all(fit: Callable[..., TrainResult]) -> None:
    # 20 examples: 3 batches of 8, 8 and 4; windows of 2 and 1 batches; 1.5 epochs are 3 steps.
    result = fit(
        classifier(),
        examples(20),
        num_train_epochs=1.5,
        gradient_accumulation_steps=2,
        logging_steps=1,
    )
    assert [entry["step"] for entry in result.history] == [1, 2, 3]
    unknown = fit(
        classifier(),
        (batch for batch in DataLoader(examples(20), batch_size=8)),
        lr_scheduler_type="constant",
        logging_steps=1,
    )
    assert [entry["step"] for entry in unknown.history] == [1, 2, 3]


def test_data_that_ends_early_is_said(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    result = fit(classifier(), iter(DataLoader(examples(20), batch_size=8)), max_steps=9)
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step-3"
    assert [record.message for record in caplog.records] == [
        "train: the data ended after step 3 of 9"
    ]


def test_gradients_that_only_the_optimizer_knows_do_not_add_up(
    fit: Callable[..., TrainResult],
) -> None:
    """The loss's own weights, and a layer unfrozen on the way."""
    model, scale = classifier(), nn.Parameter(torch.ones(CLASSES))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.0)
    left_over = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        model[0].requires_grad_(True)
        left_over.append([p.grad for p in (*model.parameters(), scale) if p.grad is not None])
        return nn.functional.cross_entropy(model(batch[0]) * scale, batch[1])

    fit(model, examples(24), loss_fn=loss_fn, optimizer=optimizer, max_steps=3)
    assert left_over == [[], [], []]


@pytest.mark.parametrize("telemetry", [True, False])
def test_complex_parameters(fit: Callable[..., TrainResult], telemetry: bool) -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.filter = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

        def forward(self, inputs: Tensor) -> Tensor:
            return (torch.fft.fft(inputs) @ self.filter).real

    model = Spectrum()
    inputs, targets = torch.randn(8, 4), torch.arange(8) % 3
    nn.functional.cross_entropy(model(inputs), targets).backward()
    norm = float(torch.linalg.vector_norm(model.filter.grad))
    result = fit(model, [(inputs, targets)], max_steps=1, telemetry=telemetry)
    assert result.metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("stderr", [None, "closed", "broken"])
def test_progress_nobody_can_see_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str | None
) -> None:
    """`2>&-`, a daemon's closed stream, and a pipe whose reader has gone."""

    class Broken(io.StringIO):
        def isatty(self) -> bool:
            return super().isatty() or not self.closed

        def write(self, text: str) -> int:
            if "1/3" in text:
                raise BrokenPipeError(32, "Broken pipe")
            return len(text)

    stream = None if stderr is None else Broken()
    if stderr == "closed" and stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)

    def slow(model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.11)  # tqdm writes at most ten times a second
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    data = examples(24)
    result = train(classifier(), data, data, loss_fn=slow, output_dir=tmp_path, max_steps=3)
    assert result.checkpoint == result.run_dir / "checkpoints" / "step-3"
