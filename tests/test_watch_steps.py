"""What counts as a step: clipping in groups, steps within steps, steps that are left out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from watching import bins_of, norm, watching

import pyvizllm
from pyvizllm.telemetry.interval_sums import LoggedSums
from pyvizllm.telemetry.observer import by_tag, learning_rates
from pyvizllm.telemetry.recorder import AS_GIVEN, BEFORE_CLIPPING, BEFORE_HOOKS
from pyvizllm.telemetry.step_buffer import GROUP_RATE, RATE

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
    np.testing.assert_allclose(np.sqrt(squares), norms, rtol=1e-6)
    # A limit is that of the norm that is shown: of everything, before any other clipping.
    limits = [s.clipped for s in seen.steps if s.clipped is not None]
    if name == "all and part":
        assert np.concatenate(limits).tolist() == [LIMIT] * STEPS
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
    """The whole step's gradients are measured, as the optimizer gets them."""
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
    np.testing.assert_allclose(np.sqrt(squares), given, rtol=1e-6)
    assert seen.stages[1] == AS_GIVEN
    assert all(steps.clipped is None for steps in seen.steps)


def test_gradients_that_were_given_up_and_zeroed_are_not_those_of_the_next_step() -> None:
    """As a GradScaler does it that skips a step of SGD, with zero_grad(set_to_none=False)."""
    model = Pair()
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=STEPS)
    given = []
    for step in range(STEPS + 2):
        backward(model, step)
        overflows = step in (2, 5)
        if overflows:
            for parameter in model.parameters():
                parameter.grad.fill_(torch.nan)
        pyvizllm.clip_grad_norm_(model.parameters(), LIMIT)
        if not overflows:
            given.append(of_everything(model))
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    watch.close()
    assert watch.step == STEPS
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in seen.names)
    # From a step that was given up until the step after the next, it is what the optimizer got.
    np.testing.assert_allclose(np.sqrt(squares)[2:], given[2:], rtol=1e-5)
    assert (np.sqrt(squares)[:2] > 10 * LIMIT).all()


def test_a_closure_that_clips_within_our_adamw_counts_once() -> None:
    model = Pair()
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, 0)
        pyvizllm.clip_grad_norm_(model.parameters(), LIMIT)
        return loss

    watch, seen = watching(model, [optimizer], every=2)
    for _ in range(2):
        optimizer.step(closure)
    watch.close()
    assert seen.stages == [AS_GIVEN]
    for name, parameter in model.named_parameters():
        assert seen.counts(0, "grad", name).sum() == 2 * parameter.numel()
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in seen.names)
    np.testing.assert_allclose(np.sqrt(squares), [LIMIT, LIMIT], rtol=1e-3)


def test_skipped_steps_of_two_optimizers() -> None:
    model = Pair()
    optimizers = [sgd(model.encoder), sgd(model.decoder)]
    watch, seen = watching(model, optimizers, every=STEPS)
    for step in range(STEPS):
        backward(model, step)
        skipped = [(step, number) in ((2, 0), (4, 0), (4, 1)) for number in range(2)]
        for module, overflows in zip((model.encoder, model.decoder), skipped, strict=True):
            if overflows:
                module.weight.grad[0, 0] = torch.inf
        by_modules(model)
        for optimizer, overflows in zip(optimizers, skipped, strict=True):
            if not overflows:  # as a GradScaler does it
                optimizer.step()
        model.zero_grad()
    watch.close()
    assert seen.published == [STEPS]
    assert seen.steps[0].skipped.tolist() == [False, False, True, False, True, False]


def test_two_phases_that_clip_everything_skip_nothing() -> None:
    """As GANs do: what one phase leaves in the other's parameters is dropped."""
    model = Pair()
    optimizers = [sgd(model.encoder), sgd(model.decoder)]
    watch, seen = watching(model, optimizers, every=2)
    for step in range(STEPS):
        for phase, optimizer in enumerate(optimizers):
            backward(model, 2 * step + phase)
            pyvizllm.clip_grad_norm_(model.parameters(), LIMIT)
            optimizer.step()
            model.zero_grad()
    watch.close()
    skipped = [steps.skipped for steps in seen.steps if steps.skipped is not None]
    assert not np.concatenate([*skipped, [False]]).any()


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
    assert (sums.clipped, sums.clipping) == (3, 3)  # the first, the 4th and the 8th


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


@pytest.mark.parametrize("first", ["step", "clip and step", "backward, clip and step"])
def test_a_step_that_raises_and_is_tried_again(first: str) -> None:
    """What is shown is of the step that was taken, and no other was."""
    model = Pair()
    optimizer = sgd(model)
    watch, seen = watching(model, [optimizer], every=3)
    fails = False

    def out_of_memory(*_: Any) -> None:
        if fails:
            raise MemoryError

    optimizer.register_step_pre_hook(out_of_memory)
    gradients = []
    for step in range(3):
        fails = step == 1
        backward(model, step)
        if "clip" in first:
            pyvizllm.clip_grad_norm_(model.parameters(), 1e9)
        if fails:
            with pytest.raises(MemoryError):
                optimizer.step()
            fails = False
            if first != "clip and step":
                model.zero_grad()
                backward(model, 10)
            if first == "backward, clip and step":
                pyvizllm.clip_grad_norm_(model.parameters(), 1e9)
        gradients.append(model.encoder.weight.grad.clone())
        optimizer.step()
        model.zero_grad()
    watch.close()
    assert watch.step == 3
    assert all(steps.skipped is None for steps in seen.steps)
    got = seen.statistic("grad", "sum_squares", "encoder.weight") ** 0.5
    np.testing.assert_allclose(got, [norm([g]) for g in gradients], rtol=1e-6)
    if first != "clip and step":
        gradients = gradients[1:]  # histograms cannot forget the attempt: they begin again
    counts = seen.counts(0, "grad", "encoder.weight")
    np.testing.assert_array_equal(counts, bins_of(gradients))
    low, high, *_ = seen.moments(0, "grad", "encoder.weight")
    assert (low, high) == (torch.stack(gradients).min(), torch.stack(gradients).max())


@pytest.mark.parametrize("max_grad_norm", [None, LIMIT])
def test_two_watches_over_one_adamw(max_grad_norm: float | None) -> None:
    model = Pair()
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-2, max_grad_norm=max_grad_norm)
    both = [watching(model, [optimizer], every=2) for _ in range(2)]
    gradients, updates = [], []
    for step in range(2):
        backward(model, step)
        gradients.append(model.encoder.weight.grad.clone())
        before = model.encoder.weight.detach().clone()
        optimizer.step()
        updates.append(model.encoder.weight.detach() - before)
        optimizer.zero_grad()
    for watch, seen in both:
        watch.close()
        assert seen.published == [2]
        counts = {kind: seen.counts(0, kind, "encoder.weight") for kind in ("grad", "update")}
        np.testing.assert_array_equal(counts["grad"], bins_of(gradients))
        np.testing.assert_array_equal(counts["update"], bins_of(updates[1:]))
        norms = seen.statistic("grad", "sum_squares", "encoder.weight") ** 0.5
        np.testing.assert_allclose(norms, [norm([g]) for g in gradients], rtol=1e-6)
        limits = seen.steps[0].clipped
        assert (limits is None) if max_grad_norm is None else limits.tolist() == [LIMIT] * 2


def test_an_interval_that_changes_within_a_step() -> None:
    """As the publisher's thread does, to keep within a budget: a step is published or it is not."""
    model = Pair()
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-2)
    watch, seen = watching(model, [optimizer], every=2)

    def widen(*_: Any) -> None:
        watch._overhead.every = 2 if watch.step == 0 else 4

    optimizer.register_step_pre_hook(widen)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert watch.flush(60)
    watch.close()
    assert seen.published == [2, 4]
    for publication in (0, 1):
        for kind in ("param", "update"):
            counts = seen.counts(publication, kind, "encoder.weight")
            low, high, *_ = seen.moments(publication, kind, "encoder.weight")
            assert counts.sum() == 128
            assert np.isfinite([low, high]).all()


@pytest.mark.parametrize("ours", [True, False])
def test_histograms_of_one_step_have_no_other(ours: bool) -> None:
    """While the publisher is late, the last step that should have been published is kept."""
    model = Pair()
    optimizer = pyvizllm.AdamW(model.parameters(), lr=1e-2) if ours else sgd(model)
    watch, seen = watching(model, [optimizer], every=1)
    gate = threading.Event()
    watch.publisher.submit(lambda: gate.wait(60) and None)
    after = []
    for step in range(8):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        after.append(model.encoder.weight.detach().clone())
        if step == 6:
            gate.set()
            assert watch.flush(60)
    watch.close()
    shown = [i for i, histograms in enumerate(seen.histograms) if "param" in histograms]
    assert 2 <= len(shown) < 8
    for publication in shown:
        values = after[seen.published[publication] - 1]
        counts = seen.counts(publication, "param", "encoder.weight")
        np.testing.assert_array_equal(counts, bins_of([values]))
        low, high, *_ = seen.moments(publication, "param", "encoder.weight")
        assert (low, high) == (values.min(), values.max())


@pytest.mark.parametrize("known", [True, False])
def test_hooks_that_change_gradients_after_ours(known: bool) -> None:
    model = Pair()
    optimizer = sgd(model)

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)

    watch, seen = watching(model, [optimizer] if known else None, every=1)
    hook = optimizer.register_step_pre_hook(clip)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if known:
            hook.remove()
    watch.close()
    assert seen.stages == [BEFORE_HOOKS, AS_GIVEN if known else BEFORE_HOOKS]


def test_hooks_of_an_earlier_watch_are_ours() -> None:
    model = Pair()
    optimizer = sgd(model)
    watching(model, [optimizer], every=1)[0].close()
    watch, seen = watching(model, None, every=1)
    backward(model, 0)
    optimizer.step()
    watch.close()
    assert seen.stages == [AS_GIVEN]


def test_learning_rates_are_not_read() -> None:
    """The meta device stands for one whose values are not to be read."""
    groups = [{"lr": torch.zeros((), device="meta")}, {"lr": 0.1}, {"lr": 0.2}]
    optimizer = sgd(Pair())
    optimizer.param_groups = groups
    rates = by_tag(learning_rates(optimizer))
    assert list(rates) == [RATE, GROUP_RATE.format(1), GROUP_RATE.format(2)]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_rate_is_that_of_its_step(kind: Callable[..., Any], known: bool) -> None:
    """The scheduler steps before anything says that the first step of an unknown one is over."""
    model = Pair()
    optimizer = torch.optim.Adam(model.parameters(), lr=kind(0.5))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    watch, seen = watching(model, [optimizer] if known else None, every=3)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    watch.close()
    (steps,) = seen.steps
    assert steps.scalars[RATE].tolist() == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_groups_with_the_first_ones_learning_rate_have_no_curve(kind: Callable[..., Any]) -> None:
    model = Pair()
    rates = (0.1, 0.1, 0.2)
    parameters = list(model.parameters())
    groups = [{"params": p, "lr": kind(r)} for p, r in zip(parameters, rates, strict=False)]
    optimizer = torch.optim.Adam(groups)
    watch, seen = watching(model, [optimizer], every=2)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    watch.close()
    (steps,) = seen.steps
    assert sorted(t for t in steps.scalars if "rate" in t) == [GROUP_RATE.format(2), RATE]
    assert steps.scalars[GROUP_RATE.format(2)].tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("clips", [True, False])
def test_what_a_grad_scaler_skips_is_a_step_where_something_tells_of_it(clips: bool) -> None:
    """SGD is not even called: only our clipping sees the gradients of two steps out of three."""
    model = Pair()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    watch, seen = watching(model, [optimizer], every=100)
    for step in range(15):
        optimizer.zero_grad()
        factor = 1.0 if step % 3 == 0 else torch.inf
        scaler.scale(factor * model(torch.ones(2, 8)).square().mean()).backward()
        scaler.unscale_(optimizer)
        if clips:
            pyvizllm.clip_grad_norm_(model.parameters(), LIMIT)
        scaler.step(optimizer)
        scaler.update()
    assert watch.step == (14 if clips else 5)  # the last one may yet be done
    watch.close()
    skipped = [s.skipped for s in seen.steps if s.skipped is not None]
    assert sum(int(flags.sum()) for flags in skipped) == (9 if clips else 0)


@pytest.mark.parametrize("known", [True, False])
def test_an_optimizer_that_leaves_a_step_out_joins_the_next_one(known: bool) -> None:
    """The loop logs when both have stepped: a log with one of them ends the step all the same."""
    model = Pair()
    first, second = sgd(model.encoder), sgd(model.decoder)
    watch, seen = watching(model, [first, second] if known else None)
    norms = []
    for step in range(6):
        model.zero_grad()
        loss = backward(model, step)
        norms.append(of_everything(model) if step != 2 else of_everything(model.decoder))
        if step != 2:
            first.step()
        second.step()
        watch.log(loss=loss)
    watch.close()
    assert watch.step == 6
    squares = sum(
        np.square(seen.statistic("grad", "norm", f"{part}.{name}"))
        for part in ("encoder", "decoder")
        for name in ("weight", "bias")
    )
    assert np.sqrt(squares).tolist() == pytest.approx(norms)


def test_micro_batches_clipped_before_the_optimizer_is_known() -> None:
    """What was measured of the model's block is not added to what its optimizer gets."""
    model = Pair()
    optimizer = sgd(model)
    watch, seen = watching(model, None, every=1)
    for seed in range(2):
        backward(model, seed)
        pyvizllm.clip_grad_norm_(model.parameters(), 0.3)
    expected = norm([model.encoder.weight.grad])
    optimizer.step()
    watch.close()
    assert seen.statistic("grad", "norm", "encoder.weight").tolist() == pytest.approx([expected])


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1}, {"skip_nonfinite": True}])
def test_float16_gradients_that_are_still_scaled_are_not_measured(options: Any) -> None:
    """Unscaled, their small values would be 0; nor may watching keep the step from being done."""

    def trained(watches: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 3).half()
        optimizer = pyvizllm.AdamW(model.parameters(), 0.01, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        watch, seen = watching(model, [optimizer], every=1)
        if not watches:
            watch.close()
        for seed in range(3):
            inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
            scaler.scale(model(inputs.half()).float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        watch.close()
        assert watch.step == (3 if watches else 0)
        if watches:
            assert not seen.statistic("grad", "numel", "weight").any()
            assert seen.statistic("update", "numel", "weight").tolist() == [18, 18, 18]
        return model.weight

    assert torch.equal(trained(True), trained(False))


@pytest.mark.parametrize("every", [5, 7])
def test_the_loss_of_a_skipped_step_is_of_that_step(every: int) -> None:
    """The sixth, the first of an interval or in the middle of one, is counted as skipped."""
    model = Pair()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    watch, seen = watching(model, [optimizer], every=every)
    for step in range(10):
        scaler.scale(backward(model, step))
        if step == 5:
            model.encoder.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        pyvizllm.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        watch.log(loss=1000.0 if step == 5 else float(step))
    watch.close()
    assert seen.scalar("train/loss")[:5].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert seen.scalar("train/loss")[5] == 1000.0  # a step that is counted, and was skipped
    assert all("train/loss" not in scalars for scalars in seen.scalars)  # none by itself


@pytest.mark.parametrize("known", [True, False])
def test_a_name_that_is_logged_after_each_of_two_optimizers(known: bool) -> None:
    """It ends no step: half of the values come when only one has stepped."""
    model = Pair()
    first, second = sgd(model.encoder), sgd(model.decoder)
    watch, seen = watching(model, [first, second] if known else None)
    for step in range(6):
        backward(model, step)
        first.step()
        watch.log(loss=float(step))
        second.step()
        watch.log(loss=float(step) + 1)
    watch.close()
    assert watch.step == 6
    assert seen.scalar("train/loss").tolist() == [step + 0.5 for step in range(6)]
