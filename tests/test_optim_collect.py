"""What AdamW collects, clips and skips, against tensor_stats of tensors from outside the step."""

from __future__ import annotations

import pytest
import torch
from test_optim import copies, gradients_of, make_parameters, run, set_gradients
from torch import Tensor
from torch.nn import Parameter

from pyvizllm import AdamW
from pyvizllm.ops import BINS, TensorStats, tensor_stats
from pyvizllm.optim import StepStatistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(53)


def change(after: Tensor, before: Tensor) -> Tensor:
    """In the arithmetic of the statistics: float32, or float64 of float64 parameters."""
    if after.dtype == torch.float64:
        return after - before
    return after.float() - before.float()


def assert_statistics(got: TensorStats, tensors: list[Tensor]) -> None:
    """The counts exactly; sums to rounding, since blocks are added in another order."""
    expected = tensor_stats([t.detach() for t in tensors])
    assert torch.equal(got.counts, expected.counts)
    cancellation = 1e-6 * expected.abs_sum.nan_to_num(0, 0, 0).max()
    torch.testing.assert_close(got.sum, expected.sum, rtol=1e-6, atol=cancellation, equal_nan=True)
    torch.testing.assert_close(
        got.values[1:4], expected.values[1:4], rtol=2e-6, atol=0, equal_nan=True
    )
    for row in (4, 5, 6):  # min, max, abs_max
        torch.testing.assert_close(
            got.values[row], expected.values[row], rtol=0, atol=0, equal_nan=True
        )
    torch.testing.assert_close(
        got.total_norm, expected.total_norm, rtol=1e-6, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_oracle_statistics_and_histograms(dtype, amsgrad, generator):
    parameters = make_parameters(generator, dtype)
    plain = copies(parameters)
    optimizer = AdamW(parameters, lr=0.01, eps=1e-4, amsgrad=amsgrad)
    optimizer.collect(grad=True)
    without = AdamW(plain, lr=0.01, eps=1e-4, amsgrad=amsgrad)
    histograms = [torch.zeros(len(parameters), BINS, dtype=torch.int64) for _ in range(3)]
    for _ in range(3):
        before = [p.detach().clone() for p in parameters]
        run([optimizer, without], generator, 1)
        collected = optimizer.collected
        assert isinstance(collected, StepStatistics)
        grads = [p.grad for p in parameters]
        changes = [change(p.detach(), b) for p, b in zip(parameters, before, strict=True)]
        for got, tensors, histogram in zip(
            (collected.grad, collected.update, collected.param),
            (grads, changes, parameters),
            histograms,
            strict=True,
        ):
            assert_statistics(got, tensors)
            tensor_stats([t.detach() for t in tensors], histogram=histogram)
            assert torch.equal(got.histogram, histogram)
        ratio = collected.update.norm / collected.param.norm
        assert torch.equal(collected.update_ratio[1:6], ratio[1:6])
    for p, q in zip(parameters, plain, strict=True):
        assert torch.equal(p, q)  # collecting changes nothing


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, 1e-30])
def test_oracle_statistics_of_broken_and_extreme_steps(value, generator):
    """In one element of a chunk, in the middle of a vector; and what follows it is not harmed."""
    parameters = make_parameters(generator, sizes=((100_000,), (40,)))
    optimizer = AdamW(parameters, lr=0.1)
    optimizer.collect()
    for index in (0, 70_003, 99_999):
        before = [p.detach().clone() for p in parameters]
        grads = gradients_of(parameters, generator)
        grads[0][index] = value
        set_gradients(parameters, grads)
        parameters[0].data[index - 1] = value
        before[0][index - 1] = value
        optimizer.step()
        taken = optimizer.take()
        changes = [change(p.detach(), b) for p, b in zip(parameters, before, strict=True)]
        assert_statistics(taken.update, changes)
        assert_statistics(taken.param, parameters)
        expected = tensor_stats(changes).histogram
        assert torch.equal(taken.update.histogram, expected)


def test_oracle_statistics_with_master_weights(generator):
    """Of the master weights: at lr 1e-4, most steps do not change the parameters."""
    parameters = make_parameters(generator, torch.bfloat16, sizes=((70_000,), (17,)))
    optimizer = AdamW(parameters, lr=1e-4, master_weights=True, moments_dtype=torch.float32)
    optimizer.collect()
    masters = [p.detach().float() for p in parameters]
    for _ in range(2):
        before = [master.clone() for master in masters]
        run([optimizer], generator, 1)
        masters = [optimizer.state[p]["master"] for p in parameters]
        changes = [new - old for new, old in zip(masters, before, strict=True)]
        taken = optimizer.take()
        assert_statistics(taken.update, changes)
        assert_statistics(taken.param, parameters)
        assert torch.equal(taken.update.histogram, tensor_stats(changes).histogram)
        assert (taken.update_ratio > 1e-5).all()
        assert taken.update.zeros.sum() < 70  # of 70017


def test_only_what_is_asked_for(generator):
    parameters = make_parameters(generator)
    optimizer = AdamW(parameters)
    assert optimizer.collected is None
    run([optimizer], generator, 1)
    assert optimizer.collected is None
    assert optimizer.grad_norm is None
    optimizer.collect(update=True, param=False, histograms=False)
    run([optimizer], generator, 1)
    collected = optimizer.collected
    assert collected.grad is None
    assert collected.param is None
    assert collected.update.histogram is None
    with pytest.raises(RuntimeError, match="update_ratio: expected statistics of both"):
        _ = collected.update_ratio
    optimizer.collect(grad=True, update=False, param=False)
    run([optimizer], generator, 1)
    assert optimizer.collected.update is None
    assert optimizer.collected.grad.histogram.sum() == sum(p.numel() for p in parameters)
    optimizer.collect(update=False, param=False)
    run([optimizer], generator, 1)
    assert optimizer.collected is None


def test_histograms_are_handed_over(generator):
    parameters = make_parameters(generator)
    optimizer = AdamW(parameters)
    optimizer.collect()
    assert optimizer.take() is None
    run([optimizer], generator, 2)
    first = optimizer.take()
    counts = first.param.histogram.clone()
    assert torch.equal(counts.sum(1), 2 * first.param.numel)
    assert optimizer.collected is None
    run([optimizer], generator, 1)
    second = optimizer.take()
    assert torch.equal(second.param.histogram.sum(1), second.param.numel)
    assert torch.equal(first.param.histogram, counts)  # whoever has taken it, owns it


def test_rows_stay_in_the_order_of_the_parameters(generator):
    """Through groups, and through steps in which some have no gradient."""
    parameters = make_parameters(generator, sizes=((3,), (70_000,), (0,), (5,), (6, 7)))
    groups = [
        {"params": [("a", parameters[0]), ("b", parameters[1]), ("c", parameters[2])]},
        {"params": [("d", parameters[3]), ("e", parameters[4])], "amsgrad": True},
    ]
    optimizer = AdamW(groups)
    optimizer.collect(grad=True)
    run([optimizer], generator, 1)
    optimizer.take()
    set_gradients(parameters, gradients_of(parameters, generator))
    parameters[1].grad = parameters[3].grad = None
    steps = [optimizer.state[p]["step"].item() for p in parameters]
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    after = [optimizer.state[p]["step"].item() for p in parameters]
    assert [b - a for a, b in zip(steps, after, strict=True)] == [1, 0, 1, 0, 1]
    collected = optimizer.collected
    assert collected.names == list("abcde")
    assert all(a is b for a, b in zip(collected.parameters, parameters, strict=True))
    assert collected.update.numel.tolist() == [3, 0, 0, 0, 42]
    empty = torch.zeros(0)
    changes = [change(p.detach(), b) for p, b in zip(parameters, before, strict=True)]
    missing = (1, 3)
    for got, tensors in (
        (collected.grad, [p.grad for p in parameters]),
        (collected.update, changes),
        (collected.param, parameters),
    ):
        assert_statistics(got, [empty if i in missing else t for i, t in enumerate(tensors)])
        assert torch.equal(got.histogram.sum(1), got.numel)


def test_a_group_added_later_gets_rows_too(generator):
    parameters = make_parameters(generator, sizes=((3,), (8,)))
    optimizer = AdamW(parameters[:1])
    optimizer.collect()
    run([optimizer], generator, 1)
    optimizer.add_param_group({"params": parameters[1:], "lr": 0.1})
    run([optimizer], generator, 1)
    assert optimizer.collected.param.numel.tolist() == [3, 8]
    assert optimizer.collected.param.histogram.sum(1).tolist() == [6, 8]


def test_clipping_is_clip_grad_norm(generator):
    parameters = make_parameters(generator)
    clipped, exact = copies(parameters), copies(parameters, torch.float64)
    optimizer = AdamW(parameters, lr=0.01, max_grad_norm=0.5)
    other = torch.optim.AdamW(clipped, lr=0.01)
    reference = torch.optim.AdamW(exact, lr=0.01)
    for step in range(20):
        grads = gradients_of(parameters, generator)
        if step % 4 == 0:
            grads = [g * 1e-6 for g in grads]  # nothing to clip
        for tensors in (parameters, clipped, exact):
            set_gradients(tensors, grads)
        norm = torch.nn.utils.clip_grad_norm_(clipped, 0.5)
        torch.nn.utils.clip_grad_norm_(exact, 0.5)
        for o in (optimizer, other, reference):
            o.step()
        torch.testing.assert_close(optimizer.grad_norm, norm.double(), rtol=1e-5, atol=0)
        for p, grad in zip(parameters, grads, strict=True):
            assert torch.equal(p.grad, grad)  # only read
    error = sum((p - q).abs().sum() for p, q in zip(parameters, exact, strict=True))
    torchs = sum((p - q).abs().sum() for p, q in zip(clipped, exact, strict=True))
    assert error <= torchs


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_step_with_a_bad_gradient_changes_nothing(value, generator):
    parameters = make_parameters(generator)
    optimizer = AdamW(parameters, skip_nonfinite=True, amsgrad=True)
    optimizer.collect(grad=True)
    run([optimizer], generator, 2)
    optimizer.take()
    before = [t.clone() for p in parameters for t in (p.detach(), *optimizer.state[p].values())]
    grads = gradients_of(parameters, generator)
    grads[5][65_536] = value
    set_gradients(parameters, grads)
    optimizer.step()
    after = [t for p in parameters for t in (p.detach(), *optimizer.state[p].values())]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    assert optimizer.skipped_steps == 1
    collected = optimizer.collected
    assert not torch.isfinite(collected.grad.norm[5])
    for statistics in (collected.update, collected.param):
        assert_statistics(statistics, [torch.zeros(0)] * len(parameters))
        assert statistics.histogram.sum() == 0
    run([optimizer], generator, 1)
    assert optimizer.skipped_steps == 1
    assert optimizer.state[parameters[0]]["step"] == 3


def test_gradients_are_unscaled_before_they_are_read(generator):
    parameters = make_parameters(generator)
    others = copies(parameters)
    scaled, plain = (
        AdamW(tensors, max_grad_norm=0.3, skip_nonfinite=True) for tensors in (parameters, others)
    )
    for optimizer in (scaled, plain):
        optimizer.collect(grad=True)
    grads = gradients_of(parameters, generator)
    set_gradients(parameters, [g * 1024 for g in grads])
    set_gradients(others, grads)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for optimizer in (scaled, plain):
        optimizer.step()
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
    assert torch.equal(scaled.collected.grad.histogram, plain.collected.grad.histogram)
    assert torch.equal(scaled.grad_norm, plain.grad_norm)


UNWRITABLE = {
    "expanded": lambda generator: torch.randn(1, 8, generator=generator).expand(6, 8),
    "expanded from one": lambda generator: torch.randn((), generator=generator).expand(6, 8),
    "overlapping": lambda generator: torch.randn(28, generator=generator).as_strided(
        (6, 8), (4, 1)
    ),
    "negated": lambda generator: torch._neg_view(torch.randn(6, 8, generator=generator)),
    "of inference": lambda generator: inference_randn(6, 8, generator=generator),
}


@torch.inference_mode()
def inference_randn(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*size, generator=generator)


@pytest.mark.parametrize("others_too", [True, False])
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_scaled_gradients_that_cannot_be_written_to(kind, others_too, generator):
    """Autograd leaves expanded gradients behind a sum(), and negated ones behind a conj()."""
    parameters = make_parameters(generator, sizes=((6, 8), (100,))[: 1 + others_too])
    others = copies(parameters)
    grads = [UNWRITABLE[kind](generator), torch.randn(100, generator=generator)][: 1 + others_too]
    set_gradients(others, [g / 1024 for g in grads])
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    scaled, plain = AdamW(parameters), AdamW(others)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for optimizer in (scaled, plain):
        optimizer.collect(grad=True)
        optimizer.step()
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
    assert_statistics(scaled.collected.grad, [q.grad for q in others])
    assert torch.equal(scaled.collected.grad.histogram, plain.collected.grad.histogram)


def test_clipping_scaled_float16_gradients_loses_no_digit(generator):
    """Divided in float16, 1.5e-7 would become 1.8e-7: only collecting gradients needs that."""
    parameters = make_parameters(generator, torch.float16, sizes=((100,),))
    (other,) = others = copies(parameters)
    scaled, plain = (
        AdamW(p, max_grad_norm=1e-9, eps=1e-12, moments_dtype=torch.float32, master_weights=True)
        for p in (parameters, others)
    )
    gradient = torch.randn(100, generator=generator).half()
    set_gradients(parameters, [gradient])
    set_gradients(others, [gradient])
    scaled.grad_scale, scaled.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    plain.step()
    scaled.step()
    assert torch.equal(parameters[0].grad, gradient)
    assert torch.equal(scaled.grad_norm * 65536, plain.grad_norm)
    assert torch.equal(parameters[0], other)
    scaled.collect(grad=True)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaled.step()


def test_taken_histograms_are_the_takers(generator):
    parameters = make_parameters(generator)
    optimizer = AdamW(parameters)
    optimizer.collect(grad=True)
    run([optimizer], generator, 1)
    live = optimizer.collected.update.histogram
    taken = optimizer.take()
    once = taken.update.histogram.clone()
    run([optimizer], generator, 1)
    assert torch.equal(taken.update.histogram, once)
    assert optimizer.collected.update.histogram is live  # where a captured graph adds to
    assert live.sum() == once.sum() == sum(p.numel() for p in parameters)


def test_what_only_torch_can_step_cannot_be_collected():
    parameter = Parameter(torch.ones(3, dtype=torch.complex64))
    parameter.grad = torch.ones(3, dtype=torch.complex64)
    for optimizer in (AdamW([parameter], max_grad_norm=1.0), AdamW([parameter])):
        optimizer.collect()
        with pytest.raises(RuntimeError, match=r"AdamW: expected dense real.*got a Parameter of"):
            optimizer.step()


@pytest.mark.parametrize("histograms", [True, False])
def test_nothing_to_collect_from(histograms):
    optimizer = AdamW([{"params": []}])
    optimizer.collect(grad=True, histograms=histograms)
    optimizer.step()
    assert optimizer.collected is None
