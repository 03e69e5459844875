"""What a watched training records, against numpy in float64 on the same tensors."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from watching import bins_of, norm, watching

import pyvizllm
from pyvizllm import AdamW
from pyvizllm.ops import CrossEntropyMetrics
from pyvizllm.ops.clip_grad_norm import observers
from pyvizllm.telemetry import Watch, block, optimizer_blocks, step_buffer
from pyvizllm.telemetry.overhead import Cost, Overhead
from pyvizllm.telemetry.recorder import AS_GIVEN, BEFORE_CLIPPING, STILL_SCALED
from pyvizllm.telemetry.step_hooks import hooks_of

REL = 1e-6  # tensor_stats sums blocks in float32; a mistake here shows in the first digits

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": lambda parameters: AdamW(parameters, lr=1e-2),
    "ours, clipping": lambda parameters: AdamW(parameters, lr=1e-2, max_grad_norm=0.1),
    "torch": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(tokens))))


NAMES = ("embedding.weight", "layer.weight", "layer.bias", "head.weight")


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (16,), generator=generator)
    loss = F.cross_entropy(model(tokens), (tokens + 1) % 11)
    (loss * scale).backward()
    return loss


class Trace:
    """The gradients, parameters and updates of each step, kept beside a watched training."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.grads: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def gradients(self) -> None:
        named = self.model.named_parameters()
        self.grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        self.before.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    def parameters(self) -> None:
        self.after.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    def updates(self, name: str) -> list[Tensor]:
        return [a[name] - b[name] for a, b in zip(self.after, self.before, strict=True)]


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    watch: Watch | None = None,
) -> Trace:
    """With a `watch`, the publisher's thread is given the time to keep up: where it is late, the
    histograms of two intervals are published together."""
    trace = Trace(model)
    for step in steps:
        backward(model, step)
        trace.gradients()
        optimizer.step()
        trace.parameters()
        optimizer.zero_grad()
        if watch is not None:
            assert watch.flush(60)
    return trace


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_of_every_step(name: str) -> None:
    """Gradients of every step; updates and parameters of every step with ours, else of those
    that are published, as the histograms of these two always."""
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch, seen = watching(model, [optimizer], every=3)
    trace = run(model, optimizer, range(1, 8), watch)
    watch.close()
    assert seen.published == [3, 6, 7]
    assert [steps.first for steps in seen.steps] == [1, 4, 7]
    assert seen.names == NAMES
    every_step = name.startswith("ours")
    for parameter in NAMES:
        grads = [g[parameter] for g in trace.grads]
        updates, after = trace.updates(parameter), [a[parameter] for a in trace.after]
        for kind, tensors in (("grad", grads), ("update", updates), ("param", after)):
            measured = kind == "grad" or every_step
            rows = list(range(7)) if measured else [2, 5]
            norms = seen.statistic(kind, "norm", parameter)
            numel = seen.statistic(kind, "numel", parameter)
            np.testing.assert_allclose(norms[rows], [norm([tensors[r]]) for r in rows], rtol=REL)
            assert (numel[rows] == tensors[0].numel()).all()
            assert numel.sum() == len(rows) * tensors[0].numel()
        for publication, (first, last) in enumerate(((0, 3), (3, 6), (6, 7))):
            np.testing.assert_array_equal(
                seen.counts(publication, "grad", parameter), bins_of(grads[first:last])
            )
            low, high, total, squares = seen.moments(publication, "grad", parameter)
            values = torch.stack(grads[first:last]).double()
            assert (low, high) == (values.min(), values.max())
            assert total == pytest.approx(float(values.sum()), abs=1e-6 * float(values.abs().sum()))
            assert squares == pytest.approx(float(values.square().sum()), rel=REL)
        for publication, last in ((0, 2), (1, 5)):
            np.testing.assert_array_equal(
                seen.counts(publication, "param", parameter), bins_of([after[last]])
            )
            np.testing.assert_array_equal(
                seen.counts(publication, "update", parameter), bins_of([updates[last]])
            )
            assert seen.moments(publication, "update", parameter)[1] == updates[last].max()
    assert seen.stages == [AS_GIVEN] * 3
    np.testing.assert_allclose(seen.scalar("train/learning_rate"), 1e-2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_watching_changes_nothing(name: str) -> None:
    plain, watched = Net(), Net()
    for model in (plain, watched):
        optimizer = OPTIMIZERS[name](model.parameters())
        if model is watched:
            watch, _ = watching(model, [optimizer], every=2)
        run(model, optimizer, range(1, 6))
    watch.close()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("known", [True, False])
def test_after_close_the_hooks_are_gone(known: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer] if known else None, every=1)
    run(model, optimizer, range(1, 3))
    watch.close()
    watch.close()
    assert watch not in observers
    assert not any(hooks.listeners for hooks in hooks_of([optimizer] if known else None))
    run(model, optimizer, range(3, 5))
    watch.log(loss=1.0)
    watch.publish()
    assert seen.published == [1, 2]


@pytest.mark.parametrize("known", [True, False])
def test_watches_come_and_go_while_another_thread_steps(known: bool) -> None:
    """In the middle of torch's iteration over its hooks, which ends with an error if it sees it."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = [optimizer] if known else None
    watch, seen = watching(model, given, every=1)
    others = []

    def elsewhere(*_: Any) -> None:
        if not others:
            others.append(watching(model, given, every=1)[0])
        else:
            others[0].close()

    def in_a_thread(*_: Any) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    # torch's dictionaries have one more behind these: the iteration goes on.
    hooks = [
        optimizer.register_step_pre_hook(in_a_thread),
        optimizer.register_step_pre_hook(lambda *_: None),
        register_optimizer_step_post_hook(in_a_thread),
        register_optimizer_step_post_hook(lambda *_: None),
    ]
    run(model, optimizer, range(1, 4))
    for hook in hooks:
        hook.remove()
    watch.close()
    assert seen.published == [1, 2, 3]


def test_hooks_registered_before_ours_are_seen() -> None:
    """Clipping by somebody else's hook: what the optimizer gets is measured, and called so."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01) and None
    )
    watch, seen = watching(model, [optimizer], every=1)
    run(model, optimizer, range(1, 3))
    watch.close()
    norms = [seen.statistic("grad", "norm", name) for name in NAMES]
    np.testing.assert_allclose(np.linalg.norm(norms, axis=0), 0.01, rtol=1e-3)
    assert seen.stages == [AS_GIVEN, AS_GIVEN]


def test_a_spike_between_two_publications_is_in_the_histogram() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch, seen = watching(model, [optimizer], every=10)
    for step in range(1, 11):
        backward(model, step, scale=1e6 if step == 4 else 1.0)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    norms = seen.statistic("grad", "norm", "head.weight")
    assert norms.argmax() == 3
    assert norms[3] > 1e5 * np.median(norms)
    assert seen.moments(0, "grad", "head.weight")[1] == pytest.approx(
        seen.statistic("grad", "max", "head.weight")[3]
    )


@pytest.mark.parametrize("name", ["ours", "torch"])
def test_our_clipping_is_measured_before(name: str) -> None:
    model, plain = Net(), Net()
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    watch, seen = watching(model, [optimizer], every=2)
    norms = []
    for step in range(1, 5):
        for each in (model, plain):
            backward(each, step)
        norms.append(norm([p.grad for p in model.parameters()]))
        total = pyvizllm.clip_grad_norm_(model.parameters(), 0.05)
        assert float(total) == pytest.approx(norms[-1], rel=REL)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm([p.grad for p in model.parameters()]) == pytest.approx(0.05, rel=1e-4)
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    watch.close()
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in NAMES)
    np.testing.assert_allclose(np.sqrt(squares), norms, rtol=REL)
    assert seen.stages == [BEFORE_CLIPPING] * 2
    assert all((steps.clipped == 0.05).all() for steps in seen.steps)
    for one, other_one in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other_one, rtol=1e-5, atol=1e-7)


def test_somebody_elses_clipping_is_said() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=2)
    for step in range(1, 5):
        backward(model, step)
        clip = pyvizllm.clip_grad_norm_ if step == 3 else torch.nn.utils.clip_grad_norm_
        clip(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert seen.stages == [
        AS_GIVEN,
        f"in some steps {BEFORE_CLIPPING}, in others {AS_GIVEN}",
    ]
    squares = np.sqrt(sum(seen.statistic("grad", "sum_squares", name) for name in NAMES))
    np.testing.assert_allclose(squares[[0, 1, 3]], 0.05, rtol=1e-4)
    assert squares[2] > 0.06


def test_a_list_that_is_not_ours_is_clipped_by_its_own_norm() -> None:
    model, extra = Net(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watching(model, [optimizer], every=2)
    backward(model, 1)
    extra.grad = torch.full((3,), 5.0)
    gradients = [extra.grad, *(p.grad for p in model.parameters())]
    expected = norm(gradients)
    assert float(pyvizllm.clip_grad_norm_([extra, *model.parameters()], 1.0)) == pytest.approx(
        expected, rel=REL
    )
    watch.close()


def test_logging_after_the_step_belongs_to_that_step() -> None:
    for after in (True, False):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch, seen = watching(model, [optimizer], every=2)
        losses = []
        for step in range(1, 6):
            loss = backward(model, step)
            losses.append(float(loss.detach()))
            if not after:
                watch.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            if after:
                watch.log({"loss": loss, "own/step": step})
            assert watch.step == step
        watch.close()
        np.testing.assert_allclose(seen.scalar("train/loss"), losses, rtol=1e-6)
        if after:
            assert seen.scalar("own/step").tolist() == [1, 2, 3, 4, 5]
        assert [len(steps) for steps in seen.steps] == [2, 2, 1]
        assert seen.published == [2, 4, 5]


@pytest.mark.parametrize("known", [True, False])
def test_what_comes_before_the_second_step_is_not_of_the_first(known: bool) -> None:
    """Who steps is not known in the first step: it is over when there are signs of the next."""
    for first_sign in ("log", "micro_batch", "clip"):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch, seen = watching(model, [optimizer] if known else None, every=3)
        losses = []
        for step in range(1, 4):
            loss = backward(model, step)
            losses.append(float(loss.detach()))
            if first_sign == "micro_batch":
                watch.micro_batch(loss)
            if first_sign == "clip":
                pyvizllm.clip_grad_norm_(model.parameters(), 1.0)
            watch.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            assert watch.step == step
        watch.close()
        assert seen.published == [3]
        np.testing.assert_allclose(seen.scalar("train/loss"), losses, rtol=1e-6)
        assert (seen.statistic("grad", "numel", "head.weight") == 66).all()


def test_loops_that_log_before_are_published_at_once() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=1)
    watch.log(loss=backward(model, 1))
    optimizer.step()
    assert watch.flush(60)
    assert seen.published == [1]
    watch.close()


def test_what_begins_an_interval_is_not_added_to_the_one_before() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=3)
    for step in range(1, 8):
        backward(model, step)
        watch.log_metrics(CrossEntropyMetrics(torch.full((53,), float(step)).double()))
        watch.log(early=step)
        optimizer.step()
        watch.log(late=step)
    watch.close()
    metrics = np.concatenate([steps.metrics for steps in seen.steps])
    assert metrics[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert seen.scalar("train/early").tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert seen.scalar("train/late").tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_several_logs_of_a_step_are_averaged() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=2)
    for step in (1, 2):
        for value in (1.0, torch.tensor(2.0, requires_grad=True), torch.tensor([6.0])):
            watch.log(loss=value)
        if step == 2:
            watch.log(rare=3)
        backward(model, step)
        optimizer.step()
    for two in (torch.zeros(2), np.zeros(2)):
        with pytest.raises(ValueError, match=r"expected loss of one element, got shape \[2\]"):
            watch.log(loss=two)
    for odd in ("1", None, [1.0], 1j, torch.tensor(1j), np.array("1")):
        with pytest.raises(TypeError, match=r"expected loss to be a (real number|dense tensor)"):
            watch.log(loss=odd)  # type: ignore[arg-type]
    for tensor in (
        torch.zeros(1).to_sparse(),
        torch.zeros((), device="meta"),
        torch.zeros(()).to(torch.float8_e4m3fn),
        torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged),
    ):
        with pytest.raises(TypeError, match="expected loss to be a dense tensor of real numbers"):
            watch.log(loss=tensor)
    with pytest.raises(ValueError, match="expected loss to be a number that a float holds"):
        watch.log(loss=10**400)
    with pytest.raises(TypeError, match="expected names that are strings, got 1"):
        watch.log({1: 2.0})  # type: ignore[dict-item]
    watch.close()
    assert seen.scalar("train/loss").tolist() == [3.0, 3.0]
    np.testing.assert_array_equal(seen.scalar("train/rare"), [np.nan, 3.0])


def test_several_groups_and_the_models_order() -> None:
    """Groups in another order than the model: rows are in the model's."""
    model = Net()
    decayed = [model.head.weight, model.layer.weight, model.embedding.weight]
    groups = [{"params": decayed}, {"params": [model.layer.bias], "lr": 0.5}]
    optimizer = AdamW(groups, lr=1e-2)
    watch, seen = watching(model, [optimizer], every=2)
    trace = run(model, optimizer, range(1, 3))
    watch.close()
    assert seen.names == NAMES
    for name in NAMES:
        last = trace.updates(name)[-1:]
        np.testing.assert_array_equal(seen.counts(0, "update", name), bins_of(last))
        np.testing.assert_allclose(
            seen.statistic("grad", "norm", name), [norm([g[name]]) for g in trace.grads], rtol=REL
        )
    assert seen.scalar("train/learning_rate").tolist() == [1e-2, 1e-2]
    assert seen.scalar("learning_rate/group_1").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("known", [True, False])
def test_two_optimizers_over_one_model(known: bool) -> None:
    model = Net()
    first = torch.optim.SGD([model.head.weight, model.layer.weight], lr=0.1)
    second = AdamW([model.embedding.weight, model.layer.bias], lr=1e-2)
    watch, seen = watching(model, [first, second] if known else None, every=2)
    trace = Trace(model)
    losses = []
    for step in range(1, 6):
        loss = backward(model, step)
        losses.append(float(loss.detach()))
        trace.gradients()
        assert watch.flush(60)
        first.step()
        second.step()
        trace.parameters()
        first.zero_grad()
        second.zero_grad()
        watch.log(loss=loss)
    watch.close()
    assert watch.step == 5
    assert seen.published == [2, 4, 5]
    assert seen.names == NAMES
    np.testing.assert_allclose(seen.scalar("train/loss"), losses, rtol=1e-6)
    for name in NAMES:
        norms = [norm([g[name]]) for g in trace.grads]
        np.testing.assert_allclose(seen.statistic("grad", "norm", name), norms, rtol=REL)
        counts = bins_of([g[name] for g in trace.grads[2:4]])
        np.testing.assert_array_equal(seen.counts(1, "grad", name), counts)


def test_an_optimizer_of_something_else_is_not_ours() -> None:
    model, other = Net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    another = torch.optim.SGD(other.parameters(), lr=0.1)
    watch, seen = watching(model, None, every=1)
    for step in (1, 2):
        backward(model, step)
        other(torch.ones(1, 2)).sum().backward()
        another.step()
        optimizer.step()
    watch.close()
    assert seen.published == [1, 2]
    assert seen.names == NAMES


def test_frozen_then_unfrozen_and_tied() -> None:
    model = Net()
    model.head.weight = model.embedding.weight  # tied
    model.layer.bias.requires_grad_(False)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    watch, seen = watching(model, [optimizer], every=2)
    for step in range(1, 5):
        assert watch.flush(60)
        if step == 4:
            model.layer.bias.requires_grad_(True)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert [steps.names for steps in seen.steps] == [
        ("embedding.weight", "layer.weight"),
        ("embedding.weight", "layer.weight", "layer.bias"),
    ]
    assert seen.statistic("grad", "numel", "layer.bias").tolist() == [0, 0, 0, 6]
    assert seen.counts(1, "grad", "layer.bias").sum() == 6


def test_parameters_added_to_the_optimizer() -> None:
    model = Net()
    optimizer = AdamW(model.layer.parameters(), lr=1e-2)
    watch, seen = watching(model, [optimizer], every=4)
    trace = run(model, optimizer, range(1, 3))
    model.zero_grad()
    optimizer.add_param_group({"params": [model.head.weight]})
    more = run(model, optimizer, range(3, 5))
    watch.close()
    assert seen.published == [4]
    assert seen.names == ("layer.weight", "layer.bias", "head.weight")
    grads = [g["layer.weight"] for g in (*trace.grads, *more.grads)]
    np.testing.assert_allclose(
        seen.statistic("grad", "norm", "layer.weight"), [norm([g]) for g in grads], rtol=REL
    )
    np.testing.assert_array_equal(seen.counts(0, "grad", "layer.weight"), bins_of(grads))
    grads = [g["head.weight"] for g in more.grads]
    np.testing.assert_array_equal(seen.counts(0, "grad", "head.weight"), bins_of(grads))


def test_include_and_exclude() -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    watch, seen = watching(model, [optimizer], include=["weight$"], exclude="^head")
    run(model, optimizer, range(1, 4))
    watch.close()
    assert seen.names == ("embedding.weight", "layer.weight")
    with pytest.raises(ValueError, match="expected include and exclude to leave a parameter over"):
        pyvizllm.watch(model, include="nothing like it")
    with pytest.raises(ValueError, match=r"expected include to hold regular expressions, got '\('"):
        pyvizllm.watch(model, include="(")


def test_the_users_own_collecting_is_left_alone() -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.collect(grad=True, param=False)
    watch, seen = watching(model, [optimizer], every=2)
    trace = run(model, optimizer, range(1, 3))
    taken = optimizer.take()
    watch.close()
    assert taken is not None
    assert taken.param is None
    for index, name in enumerate(NAMES):
        counts = bins_of([g[name] for g in trace.grads])
        np.testing.assert_array_equal(taken.grad.histogram[index].numpy(), counts)
        np.testing.assert_array_equal(seen.counts(0, "grad", name), counts)
        np.testing.assert_array_equal(
            seen.counts(0, "update", name), bins_of(trace.updates(name)[1:])
        )


def test_copied_and_pickled_optimizers_are_on_their_own() -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    watch, seen = watching(model, [optimizer], every=1)
    run(model, optimizer, range(1, 2))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    size = len(pickle.dumps(optimizer))
    assert size < 4 * sum(p.numel() * 4 for p in model.parameters()) + 20_000
    for each in copies:
        assert not each._optimizer_step_pre_hooks
        for group in each.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        each.step()
        assert each.collected is None
    watch.close()
    assert seen.published == [1]


def test_a_closure_computes_the_gradients_itself() -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    watch, seen = watching(model, [optimizer], every=1)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, 1)
        calls.append(norm([p.grad for p in model.parameters()]))
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    watch.close()
    assert seen.published == [1, 2]
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in NAMES)
    assert np.sqrt(squares)[1] == pytest.approx(calls[-1], rel=REL)


def test_gradients_that_cannot_be_measured_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=2)
    with caplog.at_level(logging.WARNING, logger="pyvizllm"):
        for _ in range(3):
            model(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        watch.close()
    assert [record.message.partition(": expected")[0] for record in caplog.records] == [
        "watch: grad of 0.weight is left out"
    ]
    assert seen.statistic("grad", "numel", "0.weight").tolist() == [0, 0, 0]
    assert seen.statistic("grad", "numel", "1.weight").tolist() == [6, 6, 6]
    assert seen.statistic("update", "numel", "0.weight").tolist() == [0, 15, 0]


def test_complex_parameters_are_pairs_of_real_numbers() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=1)
    (parameter,) = model.parameters()
    (parameter.conj() * parameter).real.sum().backward()
    gradient, before = parameter.grad.clone(), parameter.detach().clone()
    optimizer.step()
    watch.close()
    pairs = torch.view_as_real(gradient)
    np.testing.assert_array_equal(seen.counts(0, "grad", "0"), bins_of([pairs]))
    change = torch.view_as_real(parameter.detach() - before)
    np.testing.assert_array_equal(seen.counts(0, "update", "0"), bins_of([change]))


@pytest.mark.parametrize("name", ["ours", "ours, clipping", "fused"])
def test_under_a_grad_scaler(name: str) -> None:
    """These optimizers are handed the scale: the statistics are of the unscaled gradients."""
    model, plain = Net(), Net()
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    scaler, plain_scaler = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
    watch, seen = watching(model, [optimizer], every=4)
    norms = []
    for step in range(1, 5):
        for each, opt, amp in ((model, optimizer, scaler), (plain, other, plain_scaler)):
            amp.scale(backward_loss(each, step)).backward()
            if step == 3:
                next(each.parameters()).grad[0, 0] = torch.inf
            if each is model:
                norms.append(norm([p.grad for p in model.parameters()]) / amp.get_scale())
            amp.step(opt)
            amp.update()
            opt.zero_grad()
    watch.close()
    squares = sum(seen.statistic("grad", "sum_squares", name) for name in NAMES)
    np.testing.assert_allclose(np.sqrt(squares)[[0, 1, 3]], np.array(norms)[[0, 1, 3]], rtol=1e-5)
    assert seen.steps[0].skipped.tolist() == [False, False, True, False]
    for one, other_one in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other_one)


def backward_loss(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(tokens), (tokens + 1) % 11)


def test_a_step_that_the_scaler_leaves_out_after_our_clipping_is_skipped() -> None:
    """SGD is not told of the scale: its step is simply not called."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watch, seen = watching(model, [optimizer], every=4)
    for step in range(1, 5):
        scaler.scale(backward_loss(model, step)).backward()
        if step == 2:
            next(model.parameters()).grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        pyvizllm.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    watch.close()
    assert watch.step == 4
    (steps,) = seen.steps
    assert steps.skipped.tolist() == [False, True, False, False]
    assert not np.isfinite(steps.statistic("grad", "norm")[1, 0])


def test_clipping_what_is_still_scaled_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    optimizer = OPTIMIZERS["fused"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watch, seen = watching(model, [optimizer], every=2)
    for step in (1, 2):
        scaler.scale(backward_loss(model, step)).backward()
        pyvizllm.clip_grad_norm_(model.parameters(), 1.0)
        with caplog.at_level(logging.WARNING, logger="pyvizllm"):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    watch.close()
    assert STILL_SCALED in seen.stages[0]
    assert len(caplog.records) == 1
    assert "call scaler.unscale_(optimizer) before clipping" in caplog.records[0].message


def test_skipped_by_adamw_itself() -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-2, skip_nonfinite=True)
    watch, seen = watching(model, [optimizer], every=3)
    for step in range(1, 4):
        backward(model, step)
        if step == 2:
            model.layer.bias.grad[0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert seen.steps[0].skipped.tolist() == [False, True, False]
    assert seen.statistic("grad", "nans", "layer.bias").tolist() == [0, 1, 0]


def test_micro_batches() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=3)
    norms, losses = [], []
    for step in range(1, 4):
        norms.append([])
        losses.append([])
        for number in range(3):
            loss = backward(model, 10 * step + number, scale=1 / 3)
            losses[-1].append(float(loss.detach()))
            norms[-1].append(norm([p.grad for p in model.parameters()]) ** 2)
            watch.micro_batch(loss, size=16, sample_ids=[step, number])
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    micro = seen.steps[0].micro_batches
    np.testing.assert_allclose(micro.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(micro.squared_norms, norms, rtol=1e-5)
    assert micro.seen.all()
    assert (micro.sizes == 16).all()
    assert micro.sample_ids[1][2] == [2, 2]


@pytest.mark.parametrize("where", ["before_step", "after_step"])
def test_what_fails_of_ours_is_switched_off(
    where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, watched = Net(), Net()
    for model in (plain, watched):
        optimizer = AdamW(model.parameters(), lr=1e-2)
        if model is watched:
            watch, _ = watching(model, [optimizer], every=1)

            def fail(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError("of ours")

            monkeypatch.setattr(watch._observer, where, fail)
        with caplog.at_level(logging.WARNING, logger="pyvizllm"):
            run(model, optimizer, range(1, 5))
    watch.log(loss=1.0)
    watch.close()
    assert [record.message for record in caplog.records] == [
        "watch: switched off, training goes on: RuntimeError('of ours')"
    ]
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_compiled_models_and_steps() -> None:
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(compiled, [optimizer], every=2)

    @torch.compile(backend="aot_eager")
    def step() -> None:
        optimizer.step()

    norms = []
    for seed in range(1, 5):
        backward(compiled, seed)
        norms.append(norm([model.head.weight.grad]))
        step()
        optimizer.zero_grad()
    watch.close()
    assert seen.names == NAMES
    assert seen.published == [2, 4]
    np.testing.assert_allclose(seen.statistic("grad", "norm", "head.weight"), norms, rtol=REL)


def test_long_intervals_are_handed_over_in_parts() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=100)
    run(model, optimizer, range(1, 101))
    watch.close()
    assert [len(steps) for steps in seen.steps] == [64, 36]
    assert seen.published == [100]
    assert seen.counts(0, "grad", "layer.bias").sum() == 600


def test_numbers_go_on_from_a_checkpoint() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=4, start_step=6)
    run(model, optimizer, range(1, 4))
    watch.close()
    assert [steps.first for steps in seen.steps] == [7, 9]
    assert seen.published == [8, 9]


READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")


class NoReads(TorchDispatchMode):
    """Fails where an operation reads a tensor's value on this thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("aten::_local_scalar_dense on the training thread")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_tensor_is_read_on_the_training_thread(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = threading.current_thread()

    def guard(name: str) -> Any:
        real = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            # A tensor over NumPy's memory, of which there is nothing to wait for, is ours to make.
            if threading.current_thread() is training:
                raise AssertionError(f"Tensor.{name} on the training thread")
            return real(self, *args, **kwargs)

        return read

    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch, seen = watching(model, [optimizer], every=2)
    metrics = pyvizllm.CrossEntropyMetrics(torch.ones(53, dtype=torch.float64))
    rate = torch.tensor(3.0)
    plain_step = type(optimizer).step
    with monkeypatch.context() as patch:
        # torch's own steps read what they keep on the host; ours, and the hooks, read nothing.
        if not name.startswith("ours"):
            patch.setattr(type(optimizer), "step", _hooked(plain_step, patch))
        for read in READS:
            patch.setattr(Tensor, read, guard(read))
        with pytest.raises(AssertionError, match="__float__ on the training thread"):
            float(rate)
        with NoReads():
            with pytest.raises(AssertionError):
                rate.item()
            for step in range(1, 6):
                loss = backward(model, step)
                watch.micro_batch(loss, size=16)
                watch.log_metrics(metrics)
                if step % 2:
                    pyvizllm.clip_grad_norm_(model.parameters(), 1.0)
                watch.log(loss=loss, rate=rate)
                optimizer.step()
                optimizer.zero_grad()
            watch.publish()
        assert watch.flush(60)
    watch.close()
    assert seen.published == [2, 4, 5]


def _hooked(step: Any, patch: pytest.MonkeyPatch) -> Any:
    """`step` with nothing of its own inside but the hooks: parameters move by one."""

    def moved(optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        for hook in optimizer._optimizer_step_pre_hooks.values():
            hook(optimizer, (optimizer,), {})
        with torch.no_grad():
            for group in optimizer.param_groups:
                torch._foreach_add_(group["params"], 1.0)
        for hook in optimizer._optimizer_step_post_hooks.values():
            hook(optimizer, (optimizer,), {})

    return moved


def test_a_published_interval_is_not_touched_by_the_next() -> None:
    """The publisher's thread may read long after the next steps have begun; what it has not read
    in time is shown with the next interval."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=1)
    gate = threading.Event()
    watch.publisher.submit(lambda: gate.wait(60) and None)
    trace = run(model, optimizer, range(1, 6))
    watch.publish()
    gate.set()
    assert watch.flush(60)
    trace.grads += run(model, optimizer, range(6, 7)).grads
    watch.close()
    assert seen.published == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(
        seen.statistic("grad", "norm", "head.weight"),
        [norm([g["head.weight"]]) for g in trace.grads],
        rtol=REL,
    )
    with_counts = [i for i, histograms in enumerate(seen.histograms) if "grad" in histograms]
    assert with_counts == [0, 5]
    for publication, steps in ((0, trace.grads[:1]), (5, trace.grads[1:])):
        grads = [g["head.weight"] for g in steps]
        counts = seen.counts(publication, "grad", "head.weight")
        np.testing.assert_array_equal(counts, bins_of(grads))
        assert seen.moments(publication, "grad", "head.weight")[0] == torch.stack(grads).min()


def test_the_overhead_is_shown() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=2)
    run(model, optimizer, range(1, 5))
    watch.close()
    for scalars in seen.scalars:
        assert scalars["pyvizllm/overhead_pct"] > 0
        assert scalars["pyvizllm/publish_every"] == 2
        assert scalars["pyvizllm/measure_every"] == 1


def test_a_budget_widens_the_intervals() -> None:
    """Of a training that does nothing else, telemetry takes far more than a thousandth."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=1, budget=1e-3)
    for step in range(1, 17):
        run(model, optimizer, range(step, step + 1))
        assert watch.flush(60)
    watch.close()
    assert seen.scalars[-1]["pyvizllm/measure_every"] > 1
    measured = seen.statistic("grad", "numel", "head.weight") > 0
    assert not measured.all()
    every = [int(scalars["pyvizllm/publish_every"]) for scalars in seen.scalars]
    assert every == sorted(every)


def test_it_writes_a_run(tmp_path: Path) -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with pyvizllm.watch(
        model, optimizer, tmp_path, every=2, config={"width": 6}, histograms=("grad",)
    ) as watch:
        for step in range(1, 5):
            loss = backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss)
            assert watch.flush(60)
    events = EventAccumulator(str(tmp_path), {"histograms": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert events.Histograms("grad/head.weight")[1].histogram_value.num == 2 * 66
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    assert '"width": 6' in json.loads(lines[0])["texts"]["config"]


def test_the_graph_is_shown_where_it_can_be_traced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    pyvizllm.watch(model, logdir=tmp_path / "a", example_inputs=torch.zeros(2, 3)).close()
    graph = EventAccumulator(str(tmp_path / "a")).Reload().Graph()
    assert "Sequential/Linear[0]/weight/weight" in [node.name for node in graph.node]
    assert not caplog.records
    pyvizllm.watch(model, logdir=tmp_path / "b", example_inputs=[torch.zeros(2, 5)]).close()
    assert [r.levelname for r in caplog.records if "cannot be traced" in r.message] == ["WARNING"]


def test_bad_arguments_are_sentences() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.param_groups = optimizer.param_groups

    model, other = Net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "expected model of type nn.Module, got list", lambda: pyvizllm.watch([])),
        (ValueError, "every of at least 1, got 0", lambda: pyvizllm.watch(model, every=0)),
        (TypeError, "every to be an int, got None", lambda: pyvizllm.watch(model, every=None)),
        (TypeError, "every to be an int, got 1.5", lambda: pyvizllm.watch(model, every=1.5)),
        (ValueError, "max_tags of at least 1", lambda: pyvizllm.watch(model, max_tags=0)),
        (ValueError, "got 'grads'", lambda: pyvizllm.watch(model, histograms="grads")),
        (TypeError, "logdir to be a path, got 5", lambda: pyvizllm.watch(model, logdir=5)),
        (TypeError, "to name rules, of .*; got 5$", lambda: pyvizllm.watch(model, ignore=5)),
        (TypeError, r"to name rules, of .*; got \[5\]$", lambda: pyvizllm.watch(model, ignore=[5])),
        (ValueError, "max_overhead above 0", lambda: pyvizllm.watch(model, max_overhead=1.5)),
        (ValueError, "SGD over none of them", lambda: pyvizllm.watch(model, optimizer)),
        (TypeError, "Optimizer objects, got str", lambda: pyvizllm.watch(model, ["sgd"])),
        (TypeError, "Optimizer objects, got int", lambda: pyvizllm.watch(model, 3)),
        (ValueError, "optimizers, each once, got 0", lambda: pyvizllm.watch(model, [])),
        (ValueError, "each once, got 2", lambda: pyvizllm.watch(other, [optimizer, optimizer])),
        (TypeError, "include to be a regular expr", lambda: pyvizllm.watch(model, include=42)),
        (ValueError, "got None", lambda: pyvizllm.watch(model, histograms=None)),
        (TypeError, "max_overhead to be a number", lambda: pyvizllm.watch(model, max_overhead="1")),
        (TypeError, "start_step to be an int", lambda: pyvizllm.watch(model, start_step=1.5)),
        (ValueError, "start_step of at least 0", lambda: pyvizllm.watch(model, start_step=-3)),
        (TypeError, "config that JSON can hold", lambda: pyvizllm.watch(model, config={(1, 2): 3})),
        (TypeError, "hparams to be a mapping", lambda: pyvizllm.watch(model, hparams=[1])),
        (
            ValueError,
            "^watch: expected ignore to name rules, of non_finite, .*; got typo$",
            lambda: pyvizllm.watch(model, ignore=["typo"]),
        ),
        (ValueError, "; got typo$", lambda: pyvizllm.watch(model, ignore="typo")),
        (TypeError, "ignore to name rules, of .*; got 3$", lambda: pyvizllm.watch(model, ignore=3)),
        (TypeError, "sinks to be a list", lambda: pyvizllm.watch(model, sinks=[None])),
        (ValueError, "got a lazy module", lambda: pyvizllm.watch(nn.LazyLinear(2))),
        (TypeError, "got 'lr': None", lambda: pyvizllm.watch(model, hparams={"lr": None})),
        (ValueError, "a float holds", lambda: pyvizllm.watch(model, hparams={"n": 10**400})),
        (TypeError, "got Wrapper, whose __init__", lambda: pyvizllm.watch(other, Wrapper())),
    ]
    threads = threading.active_count()
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    assert threading.active_count() == threads


def test_gradients_of_several_devices_are_measured_device_by_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device stands for a second one; its statistics are made up on the CPU."""
    asked, real = [], block.tensor_stats

    def stats(tensors: list[Tensor], *, histogram: Any = True) -> Any:
        asked.append({tensor.device.type for tensor in tensors})
        if asked[-1] == {"meta"}:
            tensors = [torch.full(tensor.shape, 2.0) for tensor in tensors]
        return real(tensors, histogram=histogram)

    monkeypatch.setattr(optimizer_blocks, "_WITHOUT_VALUES", None)
    monkeypatch.setattr(block, "tensor_stats", stats)
    monkeypatch.setattr(block, "first_nonfinite_", lambda *arguments, row: None)
    monkeypatch.setattr(block, "sketch", lambda tensors, seeds: torch.zeros(len(tensors), 64))
    model = nn.ParameterList([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))])
    model[1] = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=9, histograms=())
    model[0].grad, model[1].grad = torch.ones(4), torch.zeros(3, device="meta")
    with monkeypatch.context() as patch:  # its rows are kept here too
        patch.setattr(step_buffer.torch, "zeros", _here(torch.zeros))
        patch.setattr(step_buffer.torch, "full", _here(torch.full))
        optimizer.step()
    watch.close()
    assert asked == [{"cpu"}, {"meta"}]
    assert seen.statistic("grad", "norm", "0").tolist() == pytest.approx([2.0])
    assert seen.statistic("grad", "norm", "1").tolist() == pytest.approx([12**0.5])


def _here(zeros: Any) -> Any:
    return lambda *args, device=None, **options: zeros(*args, **options)


@pytest.mark.parametrize("name", ["ours", "sgd"])
@pytest.mark.parametrize("part", ["all", "first"])
def test_parameters_without_values_are_left_out(
    name: str, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the meta device can be measured, or be a reason for a training to fail."""
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    if part == "all":
        model.to("meta")
    optimizer = OPTIMIZERS[name](model[: 1 if part == "all" else 2].parameters())
    watch = pyvizllm.watch(model, optimizer, tmp_path, every=1)
    with caplog.at_level(logging.WARNING, logger="pyvizllm"):
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            watch.micro_batch(1.0)
            if name == "sgd":  # ours steps no meta tensors
                optimizer.step()
            watch.log(loss=1.0)
        watch.close()
    if name == "sgd":
        assert watch.step == 2
        lines = (tmp_path / "history.jsonl").read_text().splitlines()
        tags = {tag for line in lines for tag in json.loads(line)["scalars"]}
        assert ("grad_norm/1.weight" in tags) == (part == "first")
        assert "grad_norm/0.weight" not in tags
    told = [record.message for record in caplog.records]
    assert told[0] == (
        "watch: parameters on the meta device, which have no values, are left out: 2 of them, "
        "0.weight the first"
    )
    assert len(told) == (1 if name == "sgd" else 2)  # the other: that nothing has stepped


def test_a_thread_that_logs_beside_the_training() -> None:
    """It ends no step, though two optimizers step one after the other, and its values are there."""
    model = Net()
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=0.1)
        for module in (model.embedding, model.layer, model.head)
    ]
    watch, seen = watching(model, optimizers, every=50)
    watch.log(temperature=1.0)
    done = threading.Event()
    logged = [1]

    def monitor() -> None:
        while not done.is_set():
            watch.log(temperature=1.0)
            logged[0] += 1

    thread = threading.Thread(target=monitor)
    thread.start()
    for step in range(1, 121):
        watch.log(loss=float(step))
        backward(model, step % 7)
        for optimizer in optimizers:
            optimizer.step()
    done.set()
    thread.join()
    watch.close()
    assert watch.step == 120
    assert seen.scalar("train/loss")[:120].tolist() == list(range(1, 121))
    temperature = seen.scalar("train/temperature")
    assert np.nanmin(temperature) == np.nanmax(temperature) == 1.0
    assert logged[0] > 120


def test_rates_leave_pauses_out() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=2)
    run(model, optimizer, range(1, 3))
    watch.publish()
    with watch.paused():
        time.sleep(0.5)
    run(model, optimizer, range(3, 5))
    watch.close()
    assert seen.seconds[1] < 0.5


def test_pauses_within_pauses_are_left_out_once() -> None:
    """A publication within one ends an interval: what is left of it is of the next."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, seen = watching(model, [optimizer], every=100)
    for step in range(1, 4):
        run(model, optimizer, range(step, step + 1))
        time.sleep(0.1)
        with watch.paused(), watch.paused():
            time.sleep(0.3)
            watch.publish()
            time.sleep(0.1)
    with watch.paused():
        run(model, optimizer, range(4, 5))
        watch.publish()
    watch.close()
    for seconds in seen.seconds[:3]:
        assert 0.1 <= seconds < 0.3
    assert 0 <= seen.seconds[3] < 0.1
    assert all(scalars.get("pyvizllm/overhead_pct", 0.0) >= 0 for scalars in seen.scalars)


@pytest.mark.parametrize("wall", [0.0, 2.0])
def test_an_interval_that_was_all_a_pause_has_no_overhead(wall: float) -> None:
    overhead = Overhead(5, 0.01, torch.device("cpu"))
    scalars = overhead.scalars(Cost(wall, 0.5, 0.5, []))
    assert scalars["pyvizllm/publish_every"] == 5
    assert (scalars.get("pyvizllm/overhead_pct", 0.0) >= 50) == (wall > 0)
