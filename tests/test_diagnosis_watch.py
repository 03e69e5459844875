"""Diagnosis of real trainings under `pyvizllm.watch`, as the doctor tells it afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import class_loss, digit_batches, mlp, text_batches, tiny_gpt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD, Optimizer

import pyvizllm
from pyvizllm.doctor import Complaint, Examination, examine
from pyvizllm.telemetry.flight_recorder import load_flight


def train(
    folder: Path,
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer,
    *,
    max_norm: float | None = None,
    accumulate: int = 1,
    every: int = 20,
) -> Examination:
    """A loop as anybody writes it, watched; returns what the doctor says of the run."""
    with pyvizllm.watch(model, optimizer, folder, every=every) as w:
        for number, batch in enumerate(batches, 1):
            loss, metrics = class_loss(model, batch)
            (loss / accumulate).backward()
            w.log_metrics(metrics)
            w.micro_batch(loss, size=len(batch[0]), sample_ids=batch[2])
            if number % accumulate == 0:
                if max_norm is not None:
                    pyvizllm.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
                w.log(lr=optimizer.param_groups[0]["lr"])
    return examine(folder)


def found(examination: Examination) -> dict[str, Complaint]:
    """What was said above "info", by rule."""
    complaints = examination.complaints
    return {c.finding.rule: c for c in complaints if c.finding.severity != "info"}


@pytest.mark.parametrize("ours", [True, False])
def test_a_healthy_run(tmp_path: Path, ours: bool) -> None:
    model = mlp(64, 64, 64, 10, dropout=0.1)
    parameters = model.parameters()
    optimizer = pyvizllm.AdamW(parameters, lr=3e-3) if ours else SGD(parameters, lr=0.1)
    examination = train(tmp_path, model, digit_batches(300), optimizer, max_norm=1.0)
    assert found(examination) == {}
    assert not examination.serious
    assert examination.summary["steps"] == 300
    assert examination.summary["loss"] < 0.7 * examination.summary["first_loss"]
    assert not (tmp_path / "flight").exists()


def test_a_fine_tune_with_frozen_layers(tmp_path: Path) -> None:
    model = tiny_gpt(n_layer=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("blocks.2", "blocks.3", "norm"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    examination = train(tmp_path, model, text_batches(120, 4), pyvizllm.AdamW(trainable, lr=1e-3))
    assert found(examination) == {}


def test_gradients_that_vanish(tmp_path: Path) -> None:
    model = mlp(64, *[64] * 9, 10, activation=nn.Sigmoid)
    examination = train(tmp_path, model, digit_batches(40), SGD(model.parameters(), lr=0.1))
    assert list(found(examination)) == ["vanishing_gradients"]
    assert found(examination)["vanishing_gradients"].finding.step == 20
    assert examination.serious


@pytest.mark.parametrize("ours", [True, False])
def test_a_layer_that_the_optimizer_does_not_have(tmp_path: Path, ours: bool) -> None:
    model = mlp(64, 64, 64, 10)
    trained = [p for name, p in model.named_parameters() if not name.startswith("0.")]
    optimizer = pyvizllm.AdamW(trained, lr=1e-3) if ours else torch.optim.AdamW(trained, lr=1e-3)
    (complaint,) = found(train(tmp_path, model, digit_batches(120), optimizer)).values()
    assert complaint.finding.rule == "left_out_parameters"
    assert complaint.finding.message == (
        "0.weight, 0.bias require a gradient and are in none of the watched optimizers "
        "(2 of 6 parameters)"
    )


class Bag(nn.Module):
    """A table with sparse gradients, which are not measured, and one that nobody looks into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.idle = nn.Embedding(50, 8, sparse=True), nn.Embedding(50, 8, sparse=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.table(x).mean(1))
        return out


@pytest.mark.parametrize("every", [20, 200])
def test_a_sparse_gradient_is_one(
    tmp_path: Path, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = Bag()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (200, 16, 5), generator=generator)
    batches = [(some, some[:, 0] % 10, None) for some in tokens]
    optimizer = SGD(model.parameters(), lr=0.5)
    examination = train(tmp_path, model, batches, optimizer, every=every)
    assert "grad of table.weight is left out" in caplog.text
    complaint = found(examination)["unused_parameters"]
    assert complaint.finding.message == (
        "idle.weight requires a gradient and has had none since the start (1 of 4 parameters)"
    )
    assert complaint.finding.step == max(every, 60)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_gradients_that_are_cleared_before_the_step(
    tmp_path: Path, ours: bool, to_none: bool
) -> None:
    model = mlp(64, 64, 10)
    kind = pyvizllm.AdamW if ours else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: optimizer.zero_grad(set_to_none=to_none))
    complaints = found(train(tmp_path, model, digit_batches(80), optimizer))
    if ours and to_none:  # it steps nothing then, and as little is measured as of sharded tensors
        assert complaints == {}
        return
    complaint = complaints["unused_parameters"]
    assert complaint.finding.severity == "serious"
    assert complaint.finding.step == 60
    assert complaint.finding.message == (
        "none of the 4 parameters has had a gradient other than zero since the start"
    )
    assert complaint.gone is None


@pytest.mark.parametrize("task", ["gpt", "digits", "all digits at once"])
@pytest.mark.parametrize("cleared", [True, False])
def test_gradients_that_nobody_clears(tmp_path: Path, task: str, cleared: bool) -> None:
    model: nn.Module = mlp(64, 64, 64, 10)
    batches = digit_batches(70, 700) if task == "all digits at once" else digit_batches(70)
    optimizer: Optimizer = SGD(model.parameters(), lr=0.05)
    if task == "gpt":
        model, batches = tiny_gpt(n_layer=2), text_batches(70, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0.0
    with pyvizllm.watch(model, optimizer, tmp_path, every=35) as w:
        for step, batch in enumerate(batches, 1):
            class_loss(model, batch)[0].backward()
            norm = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            ).norm()
            first = first or float(norm)
            if step == 64:
                growth = float(norm) / first
            optimizer.step()
            if cleared:
                optimizer.zero_grad()
            w.log(lr=0.05)
    complaints = found(examine(tmp_path))
    if cleared:
        assert complaints == {}
        return
    finding = complaints["uncleared_gradients"].finding
    assert (finding.severity, finding.step) == ("serious", 70)
    assert finding.evidence["growth"] == pytest.approx(growth, rel=1e-3)
    assert finding.message.startswith("gradients add up from step to step: their norm was ")
    assert f"and {growth:.3g} times in step 64" in finding.message


def test_weights_that_are_measured_at_publications_and_overflow_at_one(tmp_path: Path) -> None:
    model = mlp(64, 32, 10)
    optimizer = SGD(model.parameters(), lr=0.05)
    with pyvizllm.watch(model, optimizer, tmp_path, every=10):
        for step, batch in enumerate(digit_batches(30), 1):
            class_loss(model, batch)[0].backward()
            if step == 30:
                model[0].weight.grad[0, 0] = 3e38  # finite; 10 times it is not
                optimizer.param_groups[0]["lr"] = 10.0
            optimizer.step()
            optimizer.zero_grad()
    finding = found(examine(tmp_path))["non_finite"].finding
    assert finding.step == 30
    assert finding.message.startswith("the update made 0.weight not finite, from finite gradients")


@pytest.mark.parametrize("ours", [True, False])
def test_a_layer_whose_rate_is_zero(tmp_path: Path, ours: bool) -> None:
    model = mlp(64, 64, 64, 10)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3:].parameters()}]
    kind = pyvizllm.AdamW if ours else torch.optim.AdamW
    (complaint,) = found(train(tmp_path, model, digit_batches(120), kind(groups, lr=1e-3))).values()
    assert complaint.finding.rule == "frozen_parameters"
    assert complaint.finding.message.startswith("0.weight, 0.bias have a gradient")


@pytest.mark.parametrize(("rate", "share"), [(1e-5, 0.97), (1e-2, None)])
def test_updates_that_16_bits_lose(tmp_path: Path, rate: float, share: float | None) -> None:
    """Of an optimizer whose updates are measured in the published steps alone."""
    model = mlp(64, 64, 64, 10).bfloat16()
    batches = ((images.bfloat16(), labels, ids) for images, labels, ids in digit_batches(80))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    complaints = found(train(tmp_path, model, batches, optimizer))
    assert list(complaints) == ([] if share is None else ["lost_updates"])
    if share is not None:
        finding = complaints["lost_updates"].finding
        assert (finding.severity, finding.step) == ("serious", 60)  # the third that is published
        # Of uniform weights up to 1/8, those above 2**-8 stay: there half a unit exceeds 1e-5.
        assert finding.evidence["share"] == pytest.approx(share, abs=0.02)


def test_a_rate_that_replaces_the_weights(tmp_path: Path) -> None:
    model = mlp(64, 64, 64, 10)
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1.0)
    assert "learning_rate_too_high" in found(train(tmp_path, model, digit_batches(40), optimizer))


def test_a_spike_is_said_and_dumped(tmp_path: Path) -> None:
    def batches() -> Iterable[Any]:
        for step, (images, labels, ids) in enumerate(digit_batches(180), 1):
            yield images, (labels + 1) % 10 if 150 <= step < 156 else labels, ids

    model = mlp(64, 64, 64, 10)
    optimizer = pyvizllm.AdamW(model.parameters(), lr=3e-3)
    examination = train(tmp_path, model, batches(), optimizer)
    assert {rule: c.finding.step for rule, c in found(examination).items()} == {"loss_spike": 150}
    assert not examination.serious
    flight = load_flight(tmp_path / "flight" / "step-150-loss_spike.npz")
    assert flight.losses[flight.steps.tolist().index(150)] > 5
    assert flight.sample_ids[0][0] == next(digit_batches(1))[2]


class Root(nn.Module):
    """The square root of a square: 0 / 0 in the gradient of a blank image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(64, 16, bias=False), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.first(x).pow(2).sqrt())
        return out


def test_a_nan_is_traced_and_dumped(tmp_path: Path) -> None:
    batches = list(digit_batches(80, batch_size=16))
    images, labels, ids = batches[70]  # of step 36, the first of its two micro-batches
    batches[70] = torch.cat((images[:-1], torch.zeros(1, 64))), labels, ids
    model = Root()
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-3)
    examination = train(tmp_path, model, batches, optimizer, accumulate=2)
    message = found(examination)["non_finite"].finding.message
    assert found(examination)["non_finite"].finding.step == 36
    assert message.startswith(
        "the gradient of first.weight was the first that was not finite "
        "(flat index 0 = [0, 0]); it came with micro-batch 0, whose loss was "
    )
    assert f"samples {', '.join(map(str, ids[:8]))}, ..." in message
    flight = load_flight(tmp_path / "flight" / "step-36-non_finite.npz")
    assert flight.statistic("grad", "nans")[flight.steps.tolist().index(36)].sum() > 0
    assert [f.rule for f in flight.findings if f.severity == "serious"] == ["non_finite"]

    events = EventAccumulator(str(tmp_path)).Reload()
    texts = [tag for tag in events.Tags()["tensors"] if "flight" in tag]
    assert len(texts) == 1
    (text,) = events.Tensors(texts[0])
    assert b"step-36-non_finite.npz" in text.tensor_proto.string_val[0]


def test_a_nan_in_the_inputs_is_told_from_the_loss(tmp_path: Path) -> None:
    batches = list(digit_batches(40, batch_size=16))
    images, labels, ids = batches[26]
    batches[26] = images.clone().index_fill_(0, torch.tensor(3), float("nan")), labels, ids
    model = mlp(64, 32, 10)
    optimizer = SGD(model.parameters(), lr=0.1)
    finding = found(train(tmp_path, model, batches, optimizer))["non_finite"].finding
    assert finding.step == 27
    assert finding.message == (
        "the loss was already nan, and the gradient of 3.bias was the first that was not finite "
        f"(flat index 0), of 4 that were not; samples {', '.join(map(str, ids[:8]))}, ..."
    )
    assert finding.advice.startswith("Look at the inputs and targets of that batch first")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_serious_finding_is_told_once(
    tmp_path: Path,
    terminal: bool,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = mlp(64, 32, 10)
    optimizer = SGD(model.parameters(), lr=0.1)
    with pyvizllm.watch(model, optimizer, tmp_path, every=5, terminal=terminal) as w:
        for step in range(1, 11):
            loss = model(torch.full((4, 64), float("nan") if step == 7 else 1.0)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.log(loss=loss)
    told = (
        "serious (step 7, non_finite): the loss was already nan, and the gradient of 3.weight was "
        "the first that was not finite (flat index 0 = [0, 0]), of 2 that were not. Look at"
    )
    printed = [line for line in capsys.readouterr().err.splitlines() if told in line]
    logged = [r.getMessage() for r in caplog.records if f"pyvizllm: {told}" in r.getMessage()]
    assert (len(printed), len(logged)) == ((1, 0) if terminal else (0, 1))


def test_clipping_of_every_step(tmp_path: Path) -> None:
    model = mlp(64, 64, 64, 10)
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-3)
    examination = train(tmp_path, model, digit_batches(220), optimizer, max_norm=0.01)
    assert list(found(examination)) == ["constant_clipping"]


def test_targets_that_have_nothing_to_do_with_the_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    noise = ((x, torch.randint(256, y.shape), ids) for x, y, ids in text_batches(280, 4))
    model = tiny_gpt(n_layer=2)
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-3)
    (complaint,) = found(train(tmp_path, model, noise, optimizer)).values()
    assert complaint.finding.rule == "loss_at_chance"
    assert "log(256)" in complaint.finding.message


def test_batches_that_come_again(tmp_path: Path) -> None:
    model = mlp(64, 64, 10)
    batches = itertools.islice(itertools.cycle(list(digit_batches(20, 32))), 270)
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-3)
    assert list(found(train(tmp_path, model, batches, optimizer))) == ["repeated_losses"]


def test_weights_that_are_nan_from_the_start(tmp_path: Path) -> None:
    """Every step is skipped, more of them than a GradScaler's search for a scale takes."""
    model = mlp(64, 64, 10)
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-3, skip_nonfinite=True)
    (complaint,) = found(train(tmp_path, model, digit_batches(40), optimizer)).values()
    assert complaint.finding.rule == "skipped_steps"
    assert complaint.finding.severity == "serious"
    assert complaint.finding.message == (
        "24 of the last 24 optimizer steps were skipped, because gradients were not finite"
    )
