"""AdamW and clip_grad_norm_ on a GPU: the CPU's tests once more, and what only a GPU can show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_device import DEVICE, cuda_only, on_gpu
from gpu_runs import (
    bits_while_the_device_is_busy,
    on_a_side_stream,
    replayed,
    without_synchronisation,
)
from test_clip_grad_norm import (  # noqa: F401 - collected here, where the fixtures name the device
    test_mixed_dtypes_and_layouts,
    test_nonfinite_norms_poison_as_in_torch_or_raise,
    test_statistics_are_of_the_gradients_before_clipping,
    test_the_product_has_the_bits_of_torchs,
)
from test_optim import (  # noqa: F401
    make_parameters,
    test_any_layout_gives_the_same_bits,
    test_dtypes_and_options_differ_from_group_to_group,
    test_oracle_float32_error_is_no_larger_than_torchs,
    test_oracle_float64_agrees_with_torchs,
    test_oracle_infinite_and_nan_second_moments_are_torchs,
    test_oracle_low_precision_error_is_no_larger_than_torchs,
)
from test_optim_collect import (  # noqa: F401
    assert_statistics,
    test_a_step_with_a_bad_gradient_changes_nothing,
    test_clipping_is_clip_grad_norm,
    test_gradients_are_unscaled_before_they_are_read,
    test_oracle_statistics_and_histograms,
    test_oracle_statistics_of_broken_and_extreme_steps,
    test_oracle_statistics_with_master_weights,
    test_rows_stay_in_the_order_of_the_parameters,
)
from torch import Tensor
from torch.nn import Parameter

from pyvizllm import AdamW, clip_grad_norm_

pytestmark = on_gpu

SIZES = ((0,), (7,), (4097,), (1_000_003,), (0,))
LENGTH = sum(size[0] for size in SIZES)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(61)


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_the_cpus(dtype, generator):
    """Parameters and moments to rounding; statistics and histograms are of what each stepped to."""
    parameters = make_parameters(generator, dtype, SIZES)
    gradients = [torch.randn(p.shape, generator=generator).to(dtype) for p in parameters]
    runs = []
    for device in (DEVICE, "cpu"):
        own = [Parameter(p.detach().to(device, copy=True)) for p in parameters]
        optimizer = AdamW(own, lr=0.01, amsgrad=True, max_grad_norm=1.0)
        optimizer.collect(grad=True)
        for factor in (1.0, -0.5, 0.25):
            for p, gradient in zip(own, gradients, strict=True):
                p.grad = gradient.to(device) * factor
            optimizer.step()
        runs.append((own, optimizer))
    (ours, on_gpu), (theirs, on_cpu) = runs
    eps = torch.finfo(dtype).eps
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=4 * eps, atol=4 * eps)
        for name, value in on_cpu.state[q].items():
            got = on_gpu.state[p][name].cpu()
            torch.testing.assert_close(got, value, rtol=8 * eps, atol=1e-6)
    first, second = on_gpu.collected, on_cpu.collected
    assert torch.equal(first.grad.histogram.cpu(), second.grad.histogram)
    assert_statistics(first.param, ours)
    for got, wanted in ((first.update, second.update), (first.param, second.param)):
        assert torch.equal(got.numel.cpu(), wanted.numel)
        torch.testing.assert_close(got.norm.cpu(), wanted.norm, rtol=16 * eps, atol=0)


def stepping(histograms: bool = True):
    """A function of nothing that takes one step from fixed parameters; gradients, and outputs."""
    gradients = torch.zeros(LENGTH, device=DEVICE)
    start = [torch.full(size, 0.5, device=DEVICE) for size in SIZES]
    parameters = [Parameter(p.clone()) for p in start]
    optimizer = AdamW(parameters, lr=0.01, capturable=True, max_grad_norm=1.0)
    optimizer.collect(grad=True, histograms=histograms)
    pieces = gradients.split([p.numel() for p in parameters])
    for p, gradient in zip(parameters, pieces, strict=True):
        p.grad = gradient
    kept = gradients.clone()
    optimizer.step()  # makes the state
    values = torch.zeros(3, 7, len(SIZES), dtype=torch.float64, device=DEVICE)

    def run() -> None:
        kept.copy_(gradients)  # clipping writes to them
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
                for state in optimizer.state[p].values():
                    state.zero_()
        optimizer.step()
        collected = optimizer.collected
        for row, of in enumerate((collected.grad, collected.update, collected.param)):
            values[row].copy_(of.values)
        gradients.copy_(kept)

    states = [t for p in parameters for t in optimizer.state[p].values()]
    outputs: list[Tensor] = [*(p.detach() for p in parameters), *states, values]
    return run, gradients, outputs


@cuda_only
@pytest.mark.parametrize("histograms", [True, False])
def test_nothing_waits_for_the_device(histograms):
    run, _, _ = stepping(histograms)
    without_synchronisation(run)


@cuda_only
def test_a_captured_graph_steps_on_new_gradients(generator):
    run, gradients, outputs = stepping()
    values = [torch.randn(LENGTH, generator=generator) * scale for scale in (1e-6, 1.0, 30.0)]
    values[1][5] = torch.nan
    replayed(run, gradients, values, outputs)


@cuda_only
def test_the_step_is_queued_on_the_current_stream(generator):
    run, gradients, outputs = stepping()
    on_a_side_stream(run, gradients, torch.randn(LENGTH, generator=generator), outputs)


@cuda_only
def test_the_same_bits_in_20_steps_beside_other_work():
    run, gradients, outputs = stepping()
    gradients.normal_()
    bits_while_the_device_is_busy(run, outputs)


@cuda_only
def test_a_state_without_a_first_step_is_not_captured():
    parameter = Parameter(torch.ones(5))
    parameter.grad = torch.ones(5)
    optimizer = AdamW([parameter], capturable=True)
    capture = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="expected a first step before the capture"), capture:
        optimizer.step()


def clipping():
    """The same of clip_grad_norm_, whose gradients are made from an input each time."""
    memory = torch.zeros(LENGTH, device=DEVICE)
    gradients = torch.zeros(LENGTH, device=DEVICE)
    norm = torch.zeros((), device=DEVICE)
    sizes = [size[0] for size in SIZES]
    parameters = [Parameter(torch.zeros(size, device=DEVICE)) for size in sizes]
    for p, gradient in zip(parameters, gradients.split(sizes), strict=True):
        p.grad = gradient

    def run() -> None:
        gradients.copy_(memory)
        norm.copy_(clip_grad_norm_(parameters, 1.0))

    return run, memory, (gradients, norm)


@cuda_only
def test_clipping_waits_for_nothing_and_is_captured(generator):
    run, memory, outputs = clipping()
    without_synchronisation(run)
    values = [torch.randn(LENGTH, generator=generator) * scale for scale in (1e-6, 1.0)]
    replayed(run, memory, values, outputs)
    on_a_side_stream(run, memory, values[1], outputs)


def test_gradients_within_the_norm_keep_their_bits():
    """A product with a rounded 1 would not show; a NaN's payload would."""
    gradient = torch.zeros(70_001, dtype=torch.int16).fill_(0x7FC3).view(torch.bfloat16)
    before = gradient.view(torch.int16).clone()
    one = torch.ones((), dtype=torch.float64)
    torch.ops.pyvizllm.scale_([gradient, gradient[:70_000].view(7, 10_000)[:, :9_999]], one)
    assert torch.equal(gradient.view(torch.int16), before)


def test_rows_of_a_matrix_are_scaled_and_what_is_between_is_not(generator):
    """More rows than one table holds; odd, so that each begins at another alignment."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        base = torch.randn(1003, 131, generator=generator).to(dtype)
        expected = base.clone()
        expected[:, 1:130] *= 0.3377
        coefficient = torch.tensor(0.3377, dtype=torch.float64)
        torch.ops.pyvizllm.scale_([base[:, 1:130]], coefficient)
        assert torch.equal(base, expected)
