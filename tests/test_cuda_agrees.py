"""The CUDA kernels, run on the CPU (tests/cuda_on_cpu), against the CPU kernels on the same input.

Counts must be equal; what is summed in floating point agrees to its rounding, since the two add in
different orders. And two orders of the emulated threads and blocks must give the same bits.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.emulator import OPERATORS, ORDERS, Kernels
from oracle import DTYPES, logits_of_kind
from test_cuda_adamw import DTYPES as ADAMW_DTYPES
from test_cuda_adamw import Problem, problem
from test_tensor_stats import KINDS, data_of_kind
from torch import Tensor

from pyvizllm import AdamW
from pyvizllm.ops import BINS, cross_entropy, tensor_stats

ops = torch.ops.pyvizllm
NOTHING = -100


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(29)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_metrics(dtype, kernels, generator):
    """2049: a part of a tile; every third row is correct, every seventh ignored."""
    logits = logits_of_kind("normal", 50, 2049, dtype, generator) * 4
    target = torch.where(torch.arange(50) % 3 == 0, logits.argmax(1), torch.arange(50))
    target[::7] = NOTHING
    arguments = (logits, target, None, NOTHING, 0.2, 1e-3, 0.0, 1.0, 0, "mean", 1)
    kernels.schedule("shuffled")
    loss, row_max, row_sum, sums, _ = kernels.cross_entropy_forward(*arguments)
    fused_loss, _, fused_sums, _ = kernels.cross_entropy_fused(*arguments)
    # The same bits row by row; the two kernels add rows in different orders, in float64.
    torch.testing.assert_close(fused_sums, sums, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-7, atol=0)
    wanted_loss, wanted_max, wanted_sum, wanted_sums, _ = ops.cross_entropy_forward(*arguments)
    assert torch.equal(row_max, wanted_max)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(row_sum, wanted_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-6, atol=1e-6)
    whole_numbers = [0, 1, *range(8, 38)]  # tokens, correct, and calibration's two counts
    assert torch.equal(sums[whole_numbers], wanted_sums[whole_numbers])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_backward_of_the_forward_of_either(reduction, kernels, generator):
    """The row state is the same, so the backward of one takes the forward of the other."""
    logits = logits_of_kind("peaked", 9, 1003, torch.bfloat16, generator)
    target = torch.randint(1003, (9,), generator=generator, dtype=torch.int32)
    options = (NOTHING, 0.1, 1e-3, 0.0, 1.0, 0, reduction)
    upstream = torch.randn(9, generator=generator) if reduction == "none" else torch.tensor(0.3)
    states = [
        forward(logits, target, None, *options, 0)[1:3]
        for forward in (kernels.cross_entropy_forward, ops.cross_entropy_forward)
    ]
    wanted = ops.cross_entropy_backward(upstream, logits, target, None, *states[1], *options)
    for state in states:
        got = kernels.cross_entropy_backward(upstream, logits, target, None, *state, *options)
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-9)  # one unit of bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_histogram(dtype, kernels, generator):
    """Around a step of the block (4096 float32, 8192 16-bit elements); two chunks and more."""
    sizes = (0, 5, 4096, 8193, 65537, 0, 140_001, 0)
    tensors = [
        data_of_kind(kind, size, dtype, generator)
        for kind in KINDS
        for size in sizes[: 4 if kind not in ("gradient", "embedding") else None]
    ]
    if dtype == torch.float16:  # which of the NaN bins its NaNs take is up to the hardware
        tensors = [tensor.nan_to_num(1.0, torch.inf, -torch.inf) for tensor in tensors]
    wanted = tensor_stats(tensors)
    results = []
    for order in ORDERS:
        kernels.schedule(order, 3)
        histogram = torch.ones(len(tensors), BINS, dtype=torch.int64)
        results.append((*kernels.tensor_stats(tensors, histogram), histogram))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    values, counts, total_norm, histogram = results[0]
    assert torch.equal(histogram - 1, wanted.histogram)
    assert torch.equal(counts, wanted.counts)
    torch.testing.assert_close(values[4:], wanted.values[4:], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(total_norm, wanted.total_norm, rtol=1e-6, atol=0, equal_nan=True)
    cancellation = 1e-6 * wanted.abs_sum.nan_to_num(0, 0, 0).max()
    torch.testing.assert_close(values[0], wanted.sum, rtol=1e-6, atol=cancellation, equal_nan=True)
    torch.testing.assert_close(values[1:4], wanted.values[1:4], rtol=2e-6, atol=0, equal_nan=True)


def adamw_of_both(kernels: Kernels, before: Problem) -> list[tuple[Problem, list[Tensor]]]:
    """What a step leaves and returns, histograms last: of the CUDA kernel, and of the CPU's."""
    results = []
    for implementation in (kernels, ops):
        after = before.copy()
        histograms = torch.zeros(2, len(before.params), BINS, dtype=torch.int64)
        names = {"update_histogram": histograms[0], "param_histogram": histograms[1]}
        results.append((after, [*after.step(implementation, statistics=True, **names), histograms]))
    return results


@pytest.mark.parametrize("dtypes", ADAMW_DTYPES, ids=str)
def test_adamw(dtypes, kernels, generator):
    kernels.schedule("forward")
    before = problem(dtypes, generator, amsgrad=True, masters=dtypes[0].itemsize == 2)
    (cuda, _), (cpu, _) = adamw_of_both(kernels, before)
    for got, wanted in zip(cuda.lists(), cpu.lists(), strict=True):
        for a, b in zip(got, wanted, strict=True):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=min(1e-7, eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_where_the_arithmetic_is_exact(dtype, kernels, generator):
    """Without memory of earlier steps each moves by 1: parameters, sums and counts are integers."""
    kernels.schedule("shuffled")
    before = problem((dtype, dtype, dtype), generator)
    before.options |= {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    for param, grad in zip(before.params, before.grads, strict=True):
        param.random_(-9, 10, generator=generator)
        grad.random_(0, 2, generator=generator).mul_(2).sub_(1)
    (cuda, got), (cpu, wanted) = adamw_of_both(kernels, before)
    for a, b in zip((*cuda.params, *got), (*cpu.params, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert got[1][0].sum() == 0  # zeros of the update


@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("target", [5, -1, 2**40])
@pytest.mark.parametrize("name", ["forward", "backward", "fused"])
def test_target_out_of_range_is_a_device_side_assertion(name, target, softcap, kernels):
    """As in torch on CUDA; the message names the launch, the place, the block and the thread."""
    logits = torch.zeros(3, 5)
    targets = torch.tensor([0, 4, target])
    arguments = (logits, targets, None, NOTHING, 0.0, 0.0, softcap, 1.0, 0, "mean", 1)
    if name == "backward":
        row_state = (torch.zeros(3), torch.ones(3, dtype=torch.float64))
        arguments = (torch.ones(()), *arguments[:3], *row_state, *arguments[3:-1])
    kernels.schedule("forward")
    with pytest.raises(RuntimeError, match=f"cross_entropy_{name}_kernel.*assert.*target >= 0"):
        getattr(kernels, f"cross_entropy_{name}")(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_more_classes_than_are_counted_is_refused(dtype, kernels):
    """Vectors are counted in 32 bits, and so are the elements of a sum."""
    row = torch.zeros(1, 1, dtype=dtype)
    most = (2**31 if dtype == torch.float64 else 2**32) - 1024
    target = torch.zeros(1, dtype=torch.int64)
    arguments = (target, None, NOTHING, 0.0, 0.0, 0.0, 1.0, 0, "mean", 0)
    for name in ("cross_entropy_forward", "cross_entropy_fused_"):
        with pytest.raises(
            RuntimeError, match=f"expected at most {most} classes .* got {most + 1}"
        ):
            getattr(kernels, name)(row.expand(1, most + 1), *arguments)


def test_installed_kernels_are_taken_out_again(kernels, monkeypatch):
    """Or every later test of the CPU kernels would test something else."""
    calls = []
    for name in OPERATORS:
        emulated = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, run=emulated, name=name: calls.append(name) or run(*a)
        )
    x, target = torch.randn(2, 5, requires_grad=True), torch.tensor([1, 4])

    def call_everything() -> None:
        cross_entropy(x, target, reduction="none").sum().backward()  # as that of many logits
        cross_entropy(x, target, fused=True)
        cross_entropy(x * 1.0, target, fused=True, inplace=True)
        counts = tensor_stats([x.detach()]).counts
        ops.scale_([x.detach()], torch.ones((), dtype=torch.float64))
        parameter = torch.nn.Parameter(x.detach().clone())
        parameter.grad = torch.ones_like(x)
        AdamW([parameter]).step()
        ops.sketch([x.detach()], [0])
        ops.first_nonfinite_([x.detach()], counts, 0, torch.full((1,), -1))

    with kernels.installed():
        call_everything()
    assert set(calls) == set(OPERATORS)
    call_everything()
    assert len(calls) == len(OPERATORS)
