"""Healthy small trainings, of many kinds: nothing above "info" is said."""

from __future__ import annotations

import pytest
import torch
from small_tasks import (
    class_loss,
    digit_batches,
    digits,
    evaluation,
    mlp,
    plain_loss,
    text_batches,
    tiny_gpt,
)
from steps_of import Fit, fit
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pyvizllm.training.schedule import cosine


def schedule(optimizer: Optimizer, steps: int, warmup: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: cosine(step, warmup_steps=warmup, total_steps=steps))


def assert_silent(result: Fit, *, fall: float) -> None:
    """Nothing is said, of a training in which the loss falls by this factor: a healthy one."""
    start, end = sum(result.losses[:10]) / 10, sum(result.losses[-20:]) / 20
    assert end < start / fall
    assert result.rules() == [], [f for f in result.findings if f.severity != "info"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("optimizer", "batch_size", "dropout", "depth"),
    [
        ("adamw", 1, 0.0, 1),
        ("adamw", 4, 0.2, 3),
        ("adamw", 32, 0.0, 8),  # deep, with PyTorch's initialisation
        ("adamw", 128, 0.1, 2),
        ("sgd", 4, 0.0, 3),
        ("sgd", 32, 0.2, 2),
        ("sgd", 128, 0.0, 1),
    ],
)
def test_digits(optimizer: str, batch_size: int, dropout: float, depth: int, seed: int) -> None:
    steps = 300
    images, labels = digits()
    model = mlp(64, *[64] * depth, 10, seed=seed, dropout=dropout)
    chosen: Optimizer = AdamW(model.parameters(), lr=3e-3)
    if optimizer == "sgd":
        chosen = SGD(model.parameters(), lr=0.02, momentum=0.9)
    result = fit(
        model,
        digit_batches(steps, batch_size, seed=seed),
        class_loss,
        chosen,
        scheduler=schedule(chosen, steps, warmup=20),
        evaluate=evaluation(model, images[1400:], labels[1400:]),
    )
    assert_silent(result, fall=1.5)


@pytest.mark.parametrize(
    ("optimizer", "rate", "dropout", "autocast", "max_norm", "accumulate"),
    [
        ("adamw", 4e-3, 0.0, None, 1.0, 1),  # the demo's
        ("adamw", 1e-3, 0.1, torch.bfloat16, None, 1),
        ("sgd", 0.3, 0.0, None, None, 2),
    ],
)
def test_gpt(
    optimizer: str,
    rate: float,
    dropout: float,
    autocast: torch.dtype | None,
    max_norm: float | None,
    accumulate: int,
) -> None:
    steps = 260
    model = tiny_gpt(dropout=dropout)
    chosen: Optimizer = AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    if optimizer == "sgd":
        chosen = SGD(model.parameters(), lr=rate, momentum=0.9)
    result = fit(
        model,
        text_batches(steps * accumulate, 4),
        class_loss,
        chosen,
        scheduler=schedule(chosen, steps, warmup=20),
        autocast=autocast,
        max_norm=max_norm,
        accumulate=accumulate,
    )
    assert_silent(result, fall=1.5)


def test_a_long_warmup_is_no_low_rate() -> None:
    model = mlp(64, 64, 64, 10)
    optimizer = SGD(model.parameters(), lr=0.3)
    warmup = LambdaLR(optimizer, lambda step: min(1.0, 10 ** (step / 60 - 5)))
    result = fit(model, digit_batches(400), class_loss, optimizer, scheduler=warmup, log_rate=False)
    assert_silent(result, fall=1.5)


def test_training_to_the_end_of_a_cosine_and_of_the_loss() -> None:
    # 64 examples learnt by heart: losses of 1e-4, gradients of 1e-5, and a rate that ends at 0.
    model = mlp(64, 64, 64, 10)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    result = fit(
        model,
        digit_batches(500, examples=64),
        plain_loss,
        optimizer,
        scheduler=schedule(optimizer, 500, warmup=10),
    )
    assert_silent(result, fall=1000)


def test_fine_tuning_the_last_layers_of_a_trained_model() -> None:
    model = mlp(64, 64, 64, 10)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    assert_silent(fit(model, digit_batches(200, examples=700), class_loss, optimizer), fall=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith("0.")
    model[6].reset_parameters()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trainable, lr=1e-3)
    result = fit(
        model,
        digit_batches(300, 16, seed=1),
        class_loss,
        optimizer,
        scheduler=schedule(optimizer, 300, warmup=20),
    )
    assert_silent(result, fall=3)


def test_fine_tuning_a_trained_gpt_at_a_small_rate() -> None:
    # It starts where it has converged: the loss hardly moves, and need not.
    model = tiny_gpt(n_layer=2)
    fit(model, text_batches(200, 8), class_loss, AdamW(model.parameters(), lr=4e-3))
    optimizer = AdamW(model.parameters(), lr=1e-4)
    batches = text_batches(260, 4, seed=1)
    result = fit(model, batches, class_loss, optimizer, max_norm=1.0)
    assert_silent(result, fall=0.9)


def test_a_low_rank_adapter_that_begins_at_zero() -> None:
    class Adapted(nn.Module):
        """Linear layers that are frozen, with B A x added: B is zero at first (Hu et al., 2021)."""

        def __init__(self, base: nn.Sequential) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = nn.ParameterList(nn.Parameter(torch.randn(4, 64) / 8) for _ in range(3))
            self.b = nn.ParameterList(nn.Parameter(torch.zeros(n, 4)) for n in (64, 64, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer, a, b in zip(self.base[::3], self.a, self.b, strict=True):
                x = layer(x) + x @ a.T @ b.T
                x = x.relu() if layer is not self.base[-1] else x
            return x

    model = Adapted(mlp(64, 64, 64, 10))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    result = fit(model, digit_batches(300), class_loss, optimizer)
    assert_silent(result, fall=2)


def test_a_scaler_that_searches_for_its_scale() -> None:
    model = mlp(64, 64, 64, 10)
    result = fit(
        model,
        digit_batches(200),
        class_loss,
        AdamW(model.parameters(), lr=1e-3),
        autocast=torch.float16,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40),
    )
    assert 10 <= result.diagnosis.history.skipped().sum() <= 30
    assert_silent(result, fall=3)


@pytest.mark.parametrize("idle", ["zero", "none"])
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_one_of_eight_adapters_at_a_time(optimizer: type[Optimizer], idle: str) -> None:
    """Of labels that are noise, so that no falling loss excuses weights that stand still."""

    class Adapters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.each = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
            self.head = nn.Linear(64, 1)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = self.calls % 8
            self.calls += 1
            if idle == "zero":
                outputs = torch.stack([adapter(x) for adapter in self.each])
                return self.head((outputs * (torch.arange(8) == chosen)[:, None, None]).sum(0))
            return self.head(self.each[chosen](x))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).pow(2).mean()

    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(32, 64, generator=generator), torch.randn(32, 1, generator=generator))
        for _ in range(160)
    ]
    model = Adapters()
    result = fit(model, batches, loss, optimizer(model.parameters(), lr=1e-3))  # type: ignore[call-arg]
    assert "learning_rate_too_low" not in result.rules("info")
    ratios = result.diagnosis._ratios.latest
    assert ratios is not None
    assert (ratios > 1e-5).all()  # that of the one adapter, not of the seven that rest


def test_logistic_regression_from_zero() -> None:
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    result = fit(model, digit_batches(200), class_loss, SGD(model.parameters(), lr=0.5))
    assert_silent(result, fall=2)


@pytest.mark.parametrize("seed", [0, 4, 7])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad", "adadelta"])
def test_a_regression_that_learns_little_is_not_serious(optimizer: str, seed: int) -> None:
    """Updates of 1 to 3 % of the weights, and a loss that falls by 1 to 20 % in 150 steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)
    )
    direction = torch.randn(8, 1)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), torch.sin(batch[0] @ direction) + batch[1])

    chosen = {
        "rmsprop": lambda: torch.optim.RMSprop(model.parameters(), lr=1e-3),
        "adagrad": lambda: torch.optim.Adagrad(model.parameters(), lr=0.02),
        "adadelta": lambda: torch.optim.Adadelta(model.parameters()),
    }[optimizer]()
    generator = torch.Generator().manual_seed(seed + 1)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(32, 8, generator=generator)
        return inputs, 0.05 * torch.randn(32, 1, generator=generator)

    batches = [batch() for _ in range(150)]
    result = fit(model, batches, loss, chosen, chunk=10)
    assert [f for f in result.findings if f.severity == "serious"] == []


def test_a_critic_that_no_shift_changes() -> None:
    """Wasserstein: the difference of two means, in which the last bias cancels out exactly."""

    def critic_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        images = batch[0]
        outputs = model(torch.cat((images, torch.rand_like(images))))
        size = len(images)
        return outputs[:size].mean() - outputs[size:].mean()

    model = mlp(64, 32, 1, activation=nn.Softplus)
    result = fit(model, digit_batches(80), critic_loss, AdamW(model.parameters(), lr=1e-4))
    gradients = result.diagnosis.history.statistic("grad", "abs_max", 64)
    assert (gradients[:, -1] == 0).all()
    assert (gradients[:, :-1] > 0).all()
    assert "dead_parameters" not in result.rules("info")


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_gradients_that_grow_from_a_start_near_zero_are_cleared(rate: float) -> None:
    """All data at once: they grow as smoothly as sums do."""
    torch.manual_seed(0)
    model = mlp(64, 64, 64, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    images, labels = digits()
    result = fit(model, [(images, labels)] * 80, class_loss, AdamW(model.parameters(), lr=rate))
    squares = result.diagnosis.history.statistic("grad", "sum_squares", 80)[:64].sum(1)
    assert (squares[7] / squares[0]) ** 0.5 > 2
    assert (squares[32:].mean() / squares[0]) ** 0.5 > 4
    assert "uncleared_gradients" not in result.rules()
