"""Schedules against their closed forms, and the optimizers made by name."""

import math

import pytest
import torch
from torch import nn

from pyvizllm.training.config import TrainConfig
from pyvizllm.training.schedule import constant, cosine, linear, make_optimizer, make_schedule

# 4 warm-up steps rise by 1/5 each; the peak is step 4, the middle of the rest step 12 of 20.
WARMUP = [(0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0)]


@pytest.mark.parametrize(("step", "factor"), [*WARMUP, (12, 1.0), (19, 1.0), (1000, 1.0)])
def test_constant(step: int, factor: float) -> None:
    assert constant(step, warmup_steps=4) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [*WARMUP, (12, 0.5), (19, 1 / 16), (20, 0), (99, 0)])
def test_linear(step: int, factor: float) -> None:
    assert linear(step, warmup_steps=4, total_steps=20) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        *WARMUP,
        (8, 0.5 + 0.5 * math.sqrt(0.5)),
        (12, 0.5),
        (19, 0.5 * (1 + math.cos(math.pi * 15 / 16))),
        (20, 0),
    ],
)
def test_cosine(step: int, factor: float) -> None:
    assert cosine(step, warmup_steps=4, total_steps=20) == pytest.approx(factor)


def test_no_warmup_starts_at_the_peak() -> None:
    for schedule in (linear, cosine):
        assert schedule(0, warmup_steps=0, total_steps=10) == 1.0
    assert constant(0) == 1.0


def test_schedule_multiplies_each_groups_own_rate() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.1}])
    schedule = make_schedule(TrainConfig(lr_scheduler_type="linear"), optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([rate, rate / 10]) for rate in (1.0, 0.75, 0.5, 0.25)]


def test_unknown_length_needs_a_constant_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"expected max_steps .* got lr_scheduler_type='cosine'"):
        make_schedule(TrainConfig(), optimizer, None)


def test_numbers_may_be_whole() -> None:
    config = TrainConfig(adam_beta1=0, learning_rate=1)
    assert make_optimizer(config, nn.Linear(2, 2)).param_groups[0]["betas"] == (0.0, 0.999)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_weight_decay_spares_vectors(optim: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    config = TrainConfig(optim=optim, weight_decay=0.1, learning_rate=0.5)  # type: ignore[arg-type]
    optimizer = make_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    weight, *vectors = model.parameters()
    torch.testing.assert_close(weight.detach(), before[0] * (1 - 0.5 * 0.1))
    for vector, old in zip(vectors, before[1:], strict=True):
        assert torch.equal(vector, old)
