"""What counts as a step: clipping in groups, steps within steps, steps that are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from watching import norm, watching

import pyvizllm
from pyvizllm.telemetry.interval_sums import LoggedSums
from pyvizllm.telemetry.recorder import AS_GIVEN, BEFORE_CLIPPING

STEPS = 6
LIMIT = 1e-3


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(inputs)))


def backward(model: nn.Module, seed: int) -> Tensor:
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
    loss.backward()
    return loss


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=1e-2)


def of_everything(model: nn.Module) -> float:
    return norm([p.grad for p in model.parameters() if p.grad is not None])


def by_modules(model: Pair) -> None:
    pyvizllm.clip_grad_norm_(model.encoder.parameters(), LIMIT)
    pyvizllm.clip_grad_norm_(model.decoder.parameters(), 2 * LIMIT)


def by_parameters(model: Pair) -> None:
    for parameter in model.parameters():
        pyvizllm.clip_grad_norm_(parameter, LIMIT)


def all_and_part(model: Pair) -> None:
    pyvizllm.clip_grad_norm_(model.parameters(), LIMIT)
    pyvizllm.clip_grad_norm_(model.decoder.parameters(), LIMIT / 2)


CLIPPINGS: dict[str, Callable[[Pair], None]] = {
    "modules": by_modules,
    "parameters": by_parameters,
    "all and part": all_and_part,
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_clipping_in_groups_is_one_step(name: str, optimizers: int, known: bool) -> None:
    model = Pair()
    modules = [model] if optimizers == 1 else [model.encoder, model.decoder]
    steppers = [sgd(module) for module in modules]
    watch, seen = watching(model, steppers if known else None, every=3)
    norms = []
    for step in range(STEPS):
        backward(model, step)
        norms.append(of_everything(model))
        CLIPPINGS[name](model)
        for optimizer in steppers:
            optimizer.step()
        model.zero_grad()
    watch.close()
    assert watch.step == STEPS
    assert seen.published == [3, 6]
    assert all(steps.skipped is None for steps in seen.steps)
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in seen.names)
    first = 0 if known else 1  # nobody knew the first optimizer
    np.testing.assert_allclose(np.sqrt(squares)[first:], norms[first:], rtol=1e-6)
    # A limit is that of the norm that is shown: of everything, before any other clipping.
    limits = [s.clipped for s in seen.steps if s.clipped is not None]
    if name == "all and part":
        assert np.concatenate(limits)[first:].tolist() == [LIMIT] * (STEPS - first)
    else:
        assert limits == []


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_two_losses_and_two_optimizers(optimizer_class: Any) -> None:
    """As GANs do: each clips before both step."""
    first, second = Pair(), Pair()
    both = nn.ModuleList([first, second])
    optimizers = [optimizer_class(module.parameters(), lr=1e-2) for module in both]
    watch, seen = watching(both, optimizers, every=STEPS)
    for step in range(STEPS):
        for module in both:
            backward(module, step)
            pyvizllm.clip_grad_norm_(module.parameters(), LIMIT)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    watch.close()
    assert seen.published == [STEPS]
    assert seen.steps[0].skipped is None
    assert (seen.statistic("grad", "numel", "1.encoder.weight") == 128).all()


def test_clipping_in_a_closure_is_of_its_step() -> None:
    model = Pair()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    watch, seen = watching(model, [optimizer], every=2)
    norms: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, 0)
        norms.append(of_everything(model))
        pyvizllm.clip_grad_norm_(model.parameters(), LIMIT)
        return loss

    first = []
    for _ in range(4):
        first.append(len(norms))
        optimizer.step(closure)
    watch.close()
    assert len(norms) > 4
    assert watch.step == 4
    assert all(steps.skipped is None for steps in seen.steps)
    assert set(seen.stages) == {BEFORE_CLIPPING}
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in seen.names)
    np.testing.assert_allclose(np.sqrt(squares), [norms[i] for i in first], rtol=1e-6)


def test_clipping_each_micro_batch() -> None:
    """From the second step on it is known, and the whole step's gradients are measured."""
    model = Pair()
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=3)
    given = []
    for step in range(STEPS):
        for micro_batch in range(3):
            backward(model, 10 * step + micro_batch)
            pyvizllm.clip_grad_norm_(model.parameters(), 0.5)
        given.append(of_everything(model))
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert watch.step == STEPS
    assert all(steps.skipped is None for steps in seen.steps)
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in seen.names)
    np.testing.assert_allclose(np.sqrt(squares)[1:], given[1:], rtol=1e-6)
    assert seen.stages[1] == AS_GIVEN
    assert seen.steps[1].clipped is None


def test_skipped_steps_of_two_optimizers() -> None:
    model = Pair()
    optimizers = [sgd(model.encoder), sgd(model.decoder)]
    watch, seen = watching(model, optimizers, every=STEPS)
    for step in range(STEPS):
        backward(model, step)
        by_modules(model)
        for number, optimizer in enumerate(optimizers):
            if (step, number) not in ((2, 0), (4, 0), (4, 1)):  # as a GradScaler would
                optimizer.step()
        model.zero_grad()
    watch.close()
    assert seen.published == [STEPS]
    assert seen.steps[0].skipped.tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("ours", [True, False])
def test_the_share_of_clipped_steps_is_of_those_measured(ours: bool) -> None:
    """A budget leaves steps unmeasured: nobody knows their norm."""
    model = Pair()
    limit = {"max_grad_norm": LIMIT} if ours else {}
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-2, **limit)
    watch, seen = watching(model, [optimizer], every=8)
    watch._overhead.measure_every = 4
    for step in range(8):
        backward(model, step)
        if not ours:
            pyvizllm.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    sums = LoggedSums()
    for steps in seen.steps:
        sums.add(steps)
    assert (sums.clipped, sums.clipping) == (2, 2)


class Momentum(torch.optim.SGD):
    """Its step calls its parent's, and both call hooks."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """As SAM and Lookahead: another optimizer over the same parameters steps within its step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for g in inner.param_groups for p in g["params"]], {"lr": 0.0})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["subclass", "wrapper"])
def test_a_step_within_a_step_is_part_of_it(kind: str, known: bool) -> None:
    model = Pair()
    sgd(nn.Linear(1, 1))  # so that torch has put its hooks around the parent's step
    inner = Momentum(model.parameters(), lr=1e-2)
    optimizer = Wrapper(sgd(model)) if kind == "wrapper" else inner
    watch, seen = watching(model, [optimizer] if known else None, every=1)
    norms, updates = [], []
    for step in range(STEPS):
        backward(model, step)
        norms.append(norm([model.encoder.weight.grad]))
        before = model.encoder.weight.detach().clone()
        optimizer.step()
        updates.append(norm([model.encoder.weight - before]))
        optimizer.zero_grad()
    watch.close()
    assert watch.step == STEPS
    for tag, expected in (("grad", norms), ("update", updates)):
        got = seen.statistic(tag, "sum_squares", "encoder.weight") ** 0.5
        np.testing.assert_allclose(got, expected, rtol=1e-5)
