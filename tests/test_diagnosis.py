"""The engine of the diagnosis: once, again when worse, gone; and the rules' edge cases."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from recorded_steps import steps_of
from test_history import made
from torch import nn
from torch.distributions import Categorical

from pyvizllm.telemetry.diagnosing import Diagnosing
from pyvizllm.telemetry.diagnosis import (
    RESOLVED,
    RULES,
    Diagnosis,
    DiagnosisOptions,
    ParameterInfo,
    Symptom,
)
from pyvizllm.telemetry.diagnosis import rule as rule_module
from pyvizllm.telemetry.diagnosis.columns import median
from pyvizllm.telemetry.diagnosis.layers import gradient_by_depth, layers_by_depth
from pyvizllm.telemetry.diagnosis.learning_rate import LearningRateTooHigh
from pyvizllm.telemetry.diagnosis.losses import LossTrack
from pyvizllm.telemetry.diagnosis.nonfinite import NonFinite, flat_samples
from pyvizllm.telemetry.diagnosis.overfitting import Overfitting
from pyvizllm.telemetry.diagnosis.ratios import UpdateRatios
from pyvizllm.telemetry.diagnosis.repetition import autocorrelation
from pyvizllm.telemetry.diagnosis.rule import Columns, Run
from pyvizllm.telemetry.diagnosis.spikes import Divergence, Plateau
from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import STATISTICS, Finding, MicroBatches, Steps


def with_losses(losses: Sequence[float], first: int = 1) -> Steps:
    """Steps of no parameters, with these losses."""
    values = np.array(losses)
    return Steps(
        first,
        (),
        {},
        np.arange(len(values), dtype=np.float64),
        {"train/loss": values},
        {"train/loss": np.ones(len(values), np.bool_)},
    )


class Scripted:
    """A rule that says what it is told to at each hand-over."""

    name: ClassVar[str] = "scripted"
    lasting: ClassVar[bool] = True

    def __init__(self, script: Sequence[Symptom | None]) -> None:
        self.script = list(script)

    def look(self, run: Run) -> Symptom | None:
        return self.script.pop(0)


def play(script: Sequence[Symptom | None], rule: Any = None) -> list[list[Finding]]:
    """What comes out at each hand-over of 16 steps."""
    diagnosis = Diagnosis()
    diagnosis._rules = [rule or Scripted(script)]
    return [diagnosis.add(made(1 + 16 * i, 16, "a")) for i in range(len(script))]


def symptom(severity: Any = "warning", score: float = 1.0) -> Symptom:
    return Symptom(severity, "it hurts", "Rest.", {"score": score}, score)


def test_a_symptom_that_stays_is_said_once() -> None:
    said = play([None, symptom(), symptom(), symptom(score=1.9), symptom("info")])
    assert [len(findings) for findings in said] == [0, 1, 0, 0, 0]
    finding = said[1][0]
    assert finding == Finding("scripted", "warning", 32, "it hurts", "Rest.", {"score": 1.0})


def test_one_that_gets_worse_is_said_again() -> None:
    said = play([symptom("info"), symptom("warning"), symptom(score=2.0), symptom("serious")])
    assert [findings[0].severity for findings in said] == ["info", "warning", "warning", "serious"]


def test_one_with_no_score_is_said_once() -> None:
    said = play([symptom(score=0.0), symptom(score=0.0), symptom(score=0.5)])
    assert [len(findings) for findings in said] == [1, 0, 1]


def test_what_nan_hides_is_not_gone() -> None:
    diagnosis = Diagnosis()
    diagnosis._rules = [NonFinite(), Scripted([symptom(), *[None] * 19])]
    losses = [1.0] * 16 + [float("nan")] * 160 + [1.0] * 144
    said = [diagnosis.add(with_losses(losses[i : i + 16], i + 1)) for i in range(0, 320, 16)]
    found = [(finding.rule, finding.step) for findings in said for finding in findings]
    assert found == [("scripted", 16), ("non_finite", 17), ("scripted", 192)]
    assert RESOLVED in said[11][0].evidence  # of the first steps that are finite again


def test_a_loss_on_its_way_down_has_not_diverged() -> None:
    # A likelihood that begins low, leaps within the first steps and falls ever since.
    noise = np.random.default_rng(0).normal(size=200)
    losses = [0.3] * 12 + list(4.0 - 0.03 * np.arange(200) + 0.01 * noise)
    diagnosis = Diagnosis()
    found = [f for i in range(0, 212, 4) for f in diagnosis.add(with_losses(losses[i : i + 4], i))]
    assert "divergence" not in [finding.rule for finding in found]


def test_a_loss_that_never_comes_down_has_diverged() -> None:
    losses = np.concatenate((np.full(12, 0.3), np.linspace(2.0, 5.0, 100)))
    diagnosis = Diagnosis()
    found = [f for i in range(0, 112, 4) for f in diagnosis.add(with_losses(losses[i : i + 4], i))]
    (finding,) = [f for f in found if f.rule == "divergence" and f.severity == "serious"][:1]
    assert "from 0.3 at its best" in finding.message


def divergence_of(losses: np.ndarray) -> Symptom | None:
    """What the rule says first, at hand-overs of 50 steps."""
    history, track, rule = History(), LossTrack(), Divergence()
    for first in range(0, len(losses), 50):
        steps = with_losses(losses[first : first + 50].tolist(), first + 1)
        history.append(steps)
        track.add(history, len(steps))
        run = Run(DiagnosisOptions(), history, track, Columns.of((), {}), UpdateRatios(), steps)
        if symptom := rule.look(run):
            return symptom
    return None


def lasting_noise(generator: np.random.Generator, length: int, memory: float) -> np.ndarray:
    """An autoregressive process of unit variance, x' = memory x + noise."""
    noise = generator.normal(size=length) * (1 - memory**2) ** 0.5
    return np.array(list(itertools.accumulate(noise, lambda last, new: memory * last + new)))


def updates_on_one_batch(generator: np.random.Generator, length: int) -> np.ndarray:
    """A policy's loss about 0 that falls in 32 steps on each set of samples and then leaps back."""
    level = np.repeat(0.02 * generator.normal(size=length // 32 + 1), 32)[:length]
    fall = 0.02 * (np.arange(length) % 32) / 32
    return level - fall + 0.03 * generator.normal(size=length)


FLAT: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    **{
        f"1 +- {s}": lambda generator, s=s: 1 + s * generator.normal(size=8000)  # type: ignore[misc]
        for s in (0.1, 0.3, 0.5, 1.0)
    },
    "0 +- 1": lambda generator: generator.normal(size=8000),
    "squares": lambda generator: generator.normal(size=8000) ** 2,
    "with a memory of 50 steps": lambda generator: 1 + 0.2 * lasting_noise(generator, 4000, 0.98),
    "policy": lambda generator: updates_on_one_batch(generator, 4000),
    "falling": lambda generator: (
        np.exp(-np.arange(4000) / 300) + 0.1 * lasting_noise(generator, 4000, 0.98)
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_noise_is_no_divergence(name: str) -> None:
    fired = [s for s in range(20) if divergence_of(FLAT[name](np.random.default_rng(s)))]
    assert fired == []


def policy_losses(seed: int) -> list[float]:
    """Four steps of PPO (Schulman et al., 2017) on each of 400 sets of samples.

    The loss is about 0 and says nothing of the policy, whose gains become smaller as it learns.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(400):
        states = torch.randn(64, 4)
        with torch.no_grad():
            policy = Categorical(logits=model(states))
            actions = policy.sample()
            before = policy.log_prob(actions)
        rewards = ((states[:, 0] > 0).long() == actions).float() + 0.5 * torch.randn(64)
        advantages = (rewards - rewards.mean()) / rewards.std()
        for _ in range(4):
            ratio = (Categorical(logits=model(states)).log_prob(actions) - before).exp()
            loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("seed", [0, 3])
def test_a_policy_that_learns(seed: int) -> None:
    losses, diagnosis, findings = policy_losses(seed), Diagnosis(), list[Finding]()
    for first in range(0, len(losses), 50):
        findings += diagnosis.add(with_losses(losses[first : first + 50], first + 1))
    assert {finding.severity for finding in findings} <= {"info"}, findings


@pytest.mark.parametrize("seed", range(5))
def test_a_policy_whose_loss_returns_to_zero(seed: int) -> None:
    """REINFORCE (Williams, 1992): -log p * advantage is about 0 at first and in the end."""
    steps, generator = np.arange(1200), np.random.default_rng(seed)
    losses = -1.2 * np.exp(-(((steps - 250) / 150) ** 2)) + 0.15 * generator.normal(size=1200)
    assert losses[:32].mean() > -0.5
    assert losses[234:266].mean() < -1
    assert divergence_of(losses) is None
    assert divergence_of(-2.3 * np.exp(-steps / 100)) is None  # what is maximised
    lost = np.where(steps < 600, losses, 3.0 * (1 - np.exp(-(steps - 600) / 100)))
    assert divergence_of(lost) is not None


@pytest.mark.parametrize("noise", [0.03, 0.2])
def test_harder_data_is_no_divergence_while_it_is_learnt(noise: float) -> None:
    steps = np.arange(200)
    easy = 0.01 + 1.8 * np.exp(-steps / 20)
    hard = 0.3 + 2.0 * np.exp(-steps / 40)
    losses = np.concatenate((easy, hard))
    losses += noise * np.random.default_rng(0).normal(size=400)
    assert divergence_of(losses) is None
    stays = np.concatenate((easy, np.full(200, 1.5)))
    assert divergence_of(stays) is not None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("start", "end", "time", "told"),
    [
        (-0.02, -0.95, 100.0, False),  # an overlap
        (0.01, -1.0, 50.0, False),  # a similarity
        (-1.0, -19.0, 300.0, False),  # a density's logarithm
        (2.0, -300.0, 300.0, False),  # the same: it began above 0
        (-2.3, -500.0, -100.0, True),
    ],
)
def test_what_has_a_minimum_below_zero_has_no_wrong_sign(
    start: float, end: float, time: float, told: bool, seed: int
) -> None:
    steps = np.arange(500)
    share = np.expm1(-steps / time) / np.expm1(-500 / time)
    losses = start + (end - start) * share
    losses *= 1 + 0.1 * np.random.default_rng(seed).normal(size=500)
    diagnosis, found = Diagnosis(), list[Finding]()
    for first in range(0, 500, 50):
        found += diagnosis.add(with_losses(losses[first : first + 50].tolist(), first + 1))
    assert ("wrong_sign" in [finding.rule for finding in found]) == told


def test_a_loss_that_rises_has_not_stayed_where_it_is() -> None:
    diagnosis = Diagnosis()
    losses = [0.5] * 128 + [0.7] * 128
    (finding,) = [f for f in diagnosis.add(with_losses(losses)) if f.rule == "plateau"]
    assert finding.message == (
        "the loss has not fallen for 256 steps since the start: 0.5 in the first half of them, "
        "0.7 in the second"
    )
    (finding,) = [f for f in Diagnosis().add(with_losses([0.5] * 256)) if f.rule == "plateau"]
    assert finding.message == (
        "the loss has stayed at 0.5 for 256 steps since the start (0.5 in the first half of them)"
    )
    assert finding.advice.startswith(
        "If it is not as low as it should be: change the learning rate,"
    )


@pytest.mark.parametrize(
    ("end", "ratio", "severity"),
    [
        (0.7, 0.012, "info"),
        (0.8, 0.012, "warning"),  # as that of a generator whose discriminator learns
        (1.2, 0.012, "serious"),
        (0.8, 0.04, "serious"),
        (0.8, 0.008, None),
        (0.5, 0.04, None),
    ],
)
def test_how_far_a_loss_has_risen_under_large_updates(
    end: float, ratio: float, severity: str | None
) -> None:
    losses = [0.7] * 32 + [end] * 200
    history, track, ratios, steps = History(), LossTrack(), UpdateRatios(), with_losses(losses)
    history.append(steps)
    track.add(history, len(steps))
    ratios.latest = np.full(64, ratio)
    symptom = LearningRateTooHigh().look(
        Run(DiagnosisOptions(), history, track, Columns.of((), {}), ratios, steps)
    )
    assert (None if symptom is None else symptom.severity) == severity


@pytest.mark.parametrize(
    ("ratio", "way"),
    [
        (0.02, "lower the learning rate (a step changes the weights by 2 %; 0.1 % is usual)"),
        (2e-3, "change the learning rate"),
        (5e-5, "raise the learning rate (a step changes the weights by 0.005 %; 0.1 % is usual)"),
    ],
)
def test_a_plateau_tells_which_way_the_rate_should_go(ratio: float, way: str) -> None:
    history, track, ratios, steps = History(), LossTrack(), UpdateRatios(), with_losses([0.5] * 256)
    history.append(steps)
    track.add(history, len(steps))
    ratios.latest = np.full(64, ratio)
    symptom = Plateau().look(
        Run(DiagnosisOptions(), history, track, Columns.of((), {}), ratios, steps)
    )
    assert symptom is not None
    assert symptom.advice.startswith(f"If it is not as low as it should be: {way}, or look for")


@pytest.mark.parametrize("noise", [0.03, 0.3])
@pytest.mark.parametrize(
    ("at", "height", "time"), [(150, 5.0, 5.0), (1000, 2.3, 5.0), (1000, 2.3, 300.0)]
)
def test_what_was_learnt_is_lost_again(at: int, height: float, time: float, noise: float) -> None:
    steps = np.arange(2600)
    since = np.maximum(steps - at, 0)
    losses = 0.5 + 1.8 * np.exp(-steps / 100) + (height - 0.5) * (1 - np.exp(-since / time))
    losses += noise * np.random.default_rng(0).normal(size=len(steps))
    before, symptom = divergence_of(losses[:at]), divergence_of(losses)
    assert before is None
    assert symptom is not None
    assert symptom.evidence["best_loss"] == pytest.approx(0.5, abs=0.7 if at == 150 else 0.2)
    assert symptom.evidence["loss"] > symptom.evidence["best_loss"] + 0.9  # type: ignore[operator]


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(
    ("start", "best", "fall", "end", "rise"),
    [(10.8, 4.0, 300, 7.5, 50), (4.6, 2.5, 500, 4.6, 500), (2.3, 0.5, 400, 2.3, 20)],
)
def test_a_rise_is_no_measure_of_itself(
    start: float, best: float, fall: int, end: float, rise: int, noise: float
) -> None:
    """It is told while it goes on or at most 200 steps after it, and nothing is told before."""
    falling = best + (start - best) * np.exp(-np.arange(fall) / (fall / 4))
    losses = np.concatenate((falling, np.linspace(falling[-1], end, rise), np.full(200, end)))
    losses = losses + noise * np.random.default_rng(0).normal(size=len(losses))
    assert divergence_of(losses[:fall]) is None
    assert divergence_of(losses) is not None
    losses = np.concatenate((losses, end + noise * np.random.default_rng(1).normal(size=800)))
    diagnosis, found = Diagnosis(), list[Finding]()
    for first in range(0, len(losses), 50):
        found += diagnosis.add(with_losses(losses[first : first + 50].tolist(), first + 1))
    assert {f.severity for f in found if f.rule == "divergence"} == {"serious"}  # not taken back


@pytest.mark.parametrize("period", [8, 10, 50])
def test_one_hard_step_in_a_period_is_no_repetition(period: int) -> None:
    for seed in range(10):
        losses = np.where(np.arange(300) % period == 0, 2.0, 1.0)
        losses = losses + 0.1 * np.random.default_rng(seed).normal(size=300)
        found = Diagnosis().add(with_losses(losses.tolist()))
        assert "repeated_losses" not in [finding.rule for finding in found]


def test_ten_steps_on_each_batch_are_no_repetition() -> None:
    for seed in range(10):
        generator = np.random.default_rng(seed)
        level = np.repeat(0.3 * generator.normal(size=30), 10)
        losses = level - 0.2 * (np.arange(300) % 10) + 0.05 * generator.normal(size=300)
        found = Diagnosis().add(with_losses(losses.tolist()))
        assert "repeated_losses" not in [finding.rule for finding in found]


def test_four_steps_on_each_batch_do_not_repeat_every_twelve() -> None:
    # Every fourth step is the first on a new batch, whose loss is 0, as is a policy's.
    for seed in range(20):
        generator = np.random.default_rng(seed)
        gains = np.abs(0.6 + 0.5 * generator.normal(size=75))
        losses = -np.repeat(gains, 4) * (np.arange(300) % 4) + 0.1 * generator.normal(size=300)
        found = Diagnosis().add(with_losses(losses.tolist()))
        assert "repeated_losses" not in [finding.rule for finding in found]


@pytest.mark.parametrize("period", [8, 20, 43])
def test_the_same_batches_are_a_repetition(period: int) -> None:
    said = 0
    for seed in range(10):
        generator = np.random.default_rng(seed)
        losses = np.resize(generator.normal(size=period), 300) + 0.3 * generator.normal(size=300)
        found = Diagnosis().add(with_losses((3 + losses).tolist()))
        said += "repeated_losses" in [finding.rule for finding in found]
    assert said >= 8  # of 10: by chance neighbours may be alike


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_tasks_that_take_turns_are_no_repetition(tasks: int) -> None:
    generator = np.random.default_rng(0)
    levels = np.linspace(1.0, 2.0, tasks)[np.arange(320) % tasks]
    losses = levels + 0.05 * generator.normal(size=320)
    found = Diagnosis().add(with_losses(list(losses)))
    assert "repeated_losses" not in [finding.rule for finding in found]


def test_one_that_flickers_is_said_once_and_one_that_was_gone_again() -> None:
    said = play([symptom(), None, None, symptom(), None, None, None, None, symptom()])
    assert [len(findings) for findings in said] == [1, 0, 0, 0, 0, 0, 0, 1, 1]
    gone = said[7][0]
    assert (gone.severity, gone.step) == ("info", 128)
    assert gone.message == "scripted: not seen since step 64"
    assert gone.evidence[RESOLVED] == "warning of step 64"
    assert said[8][0].severity == "warning"


def test_an_event_is_not_taken_back() -> None:
    class Event(Scripted):
        lasting = False

    said = play([symptom(), *[None] * 8], Event([symptom(), *[None] * 8]))
    assert sum(map(len, said)) == 1
    said = play([symptom("info"), *[None] * 8])  # nor is what was only noted
    assert sum(map(len, said)) == 1


@pytest.mark.parametrize("shown", [False, True])
def test_serious_findings_are_logged_unless_a_terminal_shows_them(
    shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    diagnosis = Diagnosis()
    diagnosis._rules = [Scripted([symptom("warning"), symptom("serious"), symptom("serious")])]
    diagnosing = Diagnosing(diagnosis, None, shown=shown)
    with caplog.at_level(logging.INFO, "pyvizllm"):
        for first in (1, 17, 33):
            diagnosing.add(made(first, 16, "a"))
    line = "pyvizllm: serious (step 32, scripted): it hurts. Rest."
    assert [record.getMessage() for record in caplog.records] == ([] if shown else [line])


def test_a_rule_that_raises_is_switched_off_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        name: ClassVar[str] = "broken"
        lasting: ClassVar[bool] = True

        def look(self, run: Run) -> Symptom | None:
            raise IndexError("a mistake of ours")

    diagnosis = Diagnosis()
    diagnosis._rules = [Broken(), Scripted([symptom(), symptom("serious")])]
    with caplog.at_level(logging.WARNING, "pyvizllm"):
        assert len(diagnosis.add(made(1, 4, "a"))) == 1
        assert len(diagnosis.add(made(5, 4, "a"))) == 1
    assert [r.getMessage() for r in caplog.records if "broken" in r.getMessage()] == [
        "diagnosis: the rule broken failed and is switched off"
    ]
    assert "a mistake of ours" in caplog.text


def test_rules_can_be_switched_off_by_name() -> None:
    losses = [3.0, *np.linspace(3, 1, 99).tolist(), *[40.0] * 8]
    assert [f.rule for f in Diagnosis().add(with_losses(losses))] == ["loss_spike"]
    off = DiagnosisOptions(off=frozenset(["loss_spike"]))
    assert Diagnosis(off).add(with_losses(losses)) == []
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_no_rule_fails_on_strange_numbers(value: float, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"h.{i}.{kind}" for i in range(6) for kind in ("weight", "bias", "ln_1.weight")]
    info = {name: ParameterInfo((7,) if "bias" in name else (7, 1), "bfloat16") for name in names}
    diagnosis = Diagnosis(DiagnosisOptions(info))
    random = np.random.default_rng(0)
    for first in range(1, 600, 60):
        steps = made(first, 60, names)
        for table in steps.statistics.values():
            table[random.random(table.shape) < 0.3] = value
            table[random.random(60) < 0.1] = value
            table[:, STATISTICS.index("numel")] = random.choice([0, 7], (60, len(names)))
        metrics = random.random((60, 53))
        metrics[random.random(metrics.shape) < 0.2] = value
        losses, seen = random.random((60, 2)), random.random((60, 2)) < 0.8
        losses[random.random(losses.shape) < 0.2] = value
        ids: list[list[object]] = [[None, [1, "a", (2.5, None)]]] * 60
        sizes = random.choice([-1, 0, 4], (60, 2))
        diagnosis.add(
            replace(
                steps,
                scalars={"train/loss": losses[:, 0]},
                logged={"train/loss": seen[:, 0]},
                metrics=metrics,
                skipped=random.random(60) < 0.2,
                clipped=np.where(random.random(60) < 0.5, value, 1.0),
                bad_index=random.choice([-1, 3], len(names)),
                micro_batches=MicroBatches(losses, seen, losses, sizes, ids),
            )
        )
        diagnosis.add_evaluation(first + 59, {"eval/loss": value})
    assert "switched off" not in caplog.text


def test_no_rule_fails_where_there_is_nothing(caplog: pytest.LogCaptureFixture) -> None:
    diagnosis = Diagnosis()
    assert diagnosis.add_evaluation(0, {"eval/loss": 1.0}) == []
    for first in range(1, 400):
        assert diagnosis.add(Steps(first, (), {}, np.zeros(1))) == []
    assert diagnosis.add(made(400, 0, "a")) == []
    assert "switched off" not in caplog.text


def test_layers_are_the_blocks_of_a_transformer() -> None:
    names = ["wte.weight", *(f"h.{i}.{m}.weight" for i in range(11) for m in ("attn", "mlp.0"))]
    layers = layers_by_depth([*names, "head.weight"])
    assert [layer for layer, _ in layers] == [f"h.{i}" for i in range(11)]  # 10 after 9
    assert layers[10][1] == [21, 22]


def test_layers_are_modules_in_order_where_nothing_is_numbered() -> None:
    layers = layers_by_depth(["fc1.weight", "fc1.weight_v", "fc2.weight", "out.0.weight", "w"])
    assert layers == [("fc1", [0, 1]), ("fc2", [2]), ("out.0", [3]), ("w", [4])]


def test_a_matrix_outside_the_blocks_is_in_none_of_them() -> None:
    names = ["stem.weight", *(f"h.{i}.{m}.weight" for i in range(5) for m in "ab"), "head.weight"]
    sizes = [0.001 * 10.0**column for column in range(len(names))]
    gradients = [[np.full(7, size) for size in sizes]] * 12
    history = History()
    history.append(steps_of(1, names, {"grad": gradients}))
    found = gradient_by_depth(history, np.ones(len(names), np.bool_))
    assert found is not None
    assert found[0] == [f"h.{i}" for i in range(5)]
    # Of 10^(2i - 2) and ten times that, as many of each.
    expected = [2 * i - 2 + 0.5 * np.log10(101 / 2) for i in range(5)]
    np.testing.assert_allclose(found[1], expected, rtol=1e-12)


def test_matrices_are_told_by_shape_and_else_by_name() -> None:
    names = ["a.weight", "a.bias", "norm.weight", "embed.weight", "conv.weight", "scale"]
    infos = {"a.weight": ParameterInfo((3,), "float32"), "scale": ParameterInfo((1, 1), "float16")}
    columns = Columns.of(names, infos)
    assert columns.matrices.tolist() == [False, False, False, False, True, True]
    assert columns.biases.tolist() == [False, True, False, False, False, False]
    assert columns.sixteen_bit.tolist() == [False] * 5 + [True]


def test_what_is_known_of_a_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    assert ParameterInfo.of(parameter) == ParameterInfo((3, 4), "bfloat16")


def test_median_is_that_of_numpy_without_nans() -> None:
    random = np.random.default_rng(0)
    for rows in (1, 2, 5, 8):
        values = random.random((rows, 40))
        values[random.random(values.shape) < 0.4] = np.nan
        values[:, 0] = np.nan
        expected = [
            np.median(c[~np.isnan(c)]) if (~np.isnan(c)).any() else np.nan for c in values.T
        ]
        np.testing.assert_allclose(median(values), expected)


def test_autocorrelation_is_that_of_its_definition() -> None:
    values = np.random.default_rng(0).random(60) + np.sin(np.arange(60))
    centred = values - values.mean()
    expected = [
        (centred[: 60 - lag] * centred[lag:]).mean() / (centred**2).mean() for lag in range(60)
    ]
    np.testing.assert_allclose(autocorrelation(values), expected, atol=1e-12)
    assert not autocorrelation(np.ones(9)).any()


def test_ids_of_samples_of_any_form() -> None:
    ids = [torch.tensor([3, 4]), ("a", None), 5, {"x": 1}, np.array([[6]])]
    assert flat_samples(ids) == [3, 4, "a", 5, "{'x': 1}", 6]


def test_a_skipped_step_with_a_nan_did_no_harm() -> None:
    steps = made(1, 8, "ab")
    for table in steps.statistics.values():
        table[:, STATISTICS.index("zeros") + 1 : STATISTICS.index("numel")] = 0
    steps.statistic("grad", "nans")[3, 1] = 2
    spared = replace(steps, skipped=np.arange(8) == 3)
    assert "non_finite" not in [f.rule for f in Diagnosis().add(spared)]
    found = [f for f in Diagnosis().add(steps) if f.rule == "non_finite"]
    assert [(f.step, f.evidence["parameter"]) for f in found] == [(4, "b")]


def test_the_flat_index_of_another_step_is_not_claimed() -> None:
    steps = made(1, 8, "ab")
    for kind in ("grad", "param", "update"):
        table = steps.statistics[kind]  # type: ignore[index]
        table[:, STATISTICS.index("zeros") + 1 : STATISTICS.index("numel")] = 0
    steps.statistic("grad", "pos_infs")[5, 0] = 1
    info = {"a": ParameterInfo((2, 3), "float32")}
    found = Diagnosis(DiagnosisOptions(info)).add(replace(steps, bad_index=np.array([4, -1])))
    assert "the gradient of a was the first that was not finite (flat index 4 = [1, 1])" in (
        found[0].message
    )
    steps.statistic("grad", "pos_infs")[2, 1] = 1  # b at step 3, of which no index is known
    found = Diagnosis(DiagnosisOptions(info)).add(replace(steps, bad_index=np.array([4, -1])))
    assert found[0].message.endswith("the gradient of b was the first that was not finite")
    assert found[0].step == 3
    # Of no known loss: it may be the batch's fault.
    assert found[0].advice.startswith("Look at the inputs and targets of that batch first")


def test_a_loss_of_nan_counts_only_where_one_was_given() -> None:
    steps = with_losses([1.0, np.nan, np.nan])
    logged = {"train/loss": np.array([True, False, True])}
    found = Diagnosis().add(replace(steps, logged=logged))
    assert [(f.rule, f.severity, f.step) for f in found] == [("non_finite", "serious", 3)]
    assert found[0].message == "the loss was nan"

    measured = made(1, 3, "a")
    for table in measured.statistics.values():
        table[:, STATISTICS.index("zeros") + 1 : STATISTICS.index("numel")] = 0
    found = Diagnosis().add(replace(measured, scalars=steps.scalars, logged=logged))
    assert [(f.rule, f.severity) for f in found if f.rule == "non_finite"] == [
        ("non_finite", "warning")
    ]
    assert found[0].message == "the loss was nan, of gradients that were finite"


def test_each_evaluation_is_followed_for_itself() -> None:
    diagnosis, found = Diagnosis(), []
    for number in range(80):
        first = 10 * number + 1
        losses = np.linspace(1.0, 0.97, 10) * 0.97**number
        found += diagnosis.add(with_losses(losses.tolist(), first))
        found += diagnosis.add_evaluation(first + 9, {"val/loss": 0.97**number})
        if number % 8 == 7:
            found += diagnosis.add_evaluation(first + 9, {"eval/loss": 1.0 + 0.05 * number})
    messages = [f.message for f in found if f.rule == "overfitting"]
    assert all(message.startswith("eval/loss has risen") for message in messages)
    assert 1 <= len(messages) <= 2  # again when it has doubled


def test_an_overfitting_that_raises_is_switched_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: Overfitting, run: Run) -> Symptom | None:
        raise IndexError("a mistake of ours")

    monkeypatch.setattr(Overfitting, "look", look)
    diagnosis = Diagnosis()
    diagnosis.add(with_losses([1.0] * 40))
    for step in (10, 20, 30):
        assert diagnosis.add_evaluation(step, {"eval/loss": 1.0, "test/loss": 1.0}) == []
    assert [record.getMessage() for record in caplog.records] == [
        "diagnosis: the rule overfitting failed and is switched off"
    ]


@pytest.mark.parametrize("tag", ["eval/loss", "val/loss", "validation/en/loss"])
def test_overfitting_that_begins_before_the_first_steps_are_known(tag: str) -> None:
    # Evaluations every ten steps, of which the first is the best; steps come 50 at a time.
    diagnosis, findings = Diagnosis(), list[Finding]()
    train = np.exp(-np.arange(300) / 40)
    for step in range(10, 300, 10):
        findings += diagnosis.add_evaluation(step, {tag: 0.5 + step / 100, "eval/accuracy": 0.0})
        if step % 50 == 0:
            diagnosis.add(with_losses(train[step - 50 : step].tolist(), step - 49))
    (finding,) = findings[:1]
    assert (finding.rule, finding.severity) == ("overfitting", "warning")
    then = np.median(train[:32])
    assert f"{tag} has risen from 0.6 at step 10" in finding.message
    assert f"the training loss fell from {then:.4g}" in finding.message


def test_evaluations_on_two_sets_are_not_compared() -> None:
    diagnosis, findings = Diagnosis(), list[Finding]()
    for number in range(8):
        train = np.full(40, 2.0 - 0.2 * number)
        diagnosis.add(with_losses(train.tolist(), 1 + 40 * number))
        tag, loss = ("val/loss", 0.5) if number % 2 else ("test/loss", 1.0)
        findings += diagnosis.add_evaluation(40 * (number + 1), {tag: loss})
    assert findings == []


@pytest.mark.parametrize(
    ("losses", "severity"),
    [
        ([1.0, 0.9, 0.8, 1.0, 1.0, 1.0], "warning"),
        ([1.0, 0.9, 0.8, 1.0, 0.85, 1.0], None),  # it came back
        ([1.0, 0.9, 0.8, 0.94, 0.95, 0.95], None),  # within 20 %
    ],
)
@pytest.mark.parametrize("train_falls", [True, False])
def test_overfitting_is_a_lasting_rise(
    losses: list[float], severity: str | None, train_falls: bool
) -> None:
    diagnosis, findings = Diagnosis(), list[Finding]()
    for number, loss in enumerate(losses):
        level = 2.0 - 0.2 * number if train_falls else 2.0
        train = level + 0.01 * np.random.default_rng(number).random(40)
        diagnosis.add(with_losses(train.tolist(), 1 + 40 * number))
        findings += diagnosis.add_evaluation(40 * (number + 1), {"eval/loss": loss})
    expected = [severity] if severity and train_falls else []
    assert [f.severity for f in findings if f.rule == "overfitting"] == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_look_can_look_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parent's thread is not there in the child, nor does it ever leave what it was in."""
    inside, forked = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        inside.set()
        assert forked.wait(60)

    def look() -> None:
        Diagnosis().add(made(1, 3, ("h.0.weight", "h.1.weight")))

    def child() -> None:
        monkeypatch.undo()
        look()

    monkeypatch.setattr(rule_module, "gradient_by_depth", slow)
    looking = threading.Thread(target=look)
    looking.start()
    assert inside.wait(60)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    process.kill()  # one that hangs would keep pytest itself from ending
    process.join()
    forked.set()
    looking.join()
    assert process.exitcode == 0
