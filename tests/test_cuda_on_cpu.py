"""The tests of the operations once more, with the CUDA kernels in the place of the CPU ones.

The unmodified .cu files are compiled by the host compiler and run by an emulator, one fiber per
CUDA thread (tests/cuda_on_cpu). The imported tests are those of the CPU kernels: same inputs, same
tolerances, the threads of a block in ascending order. The tests written out here reach what only
the CUDA kernels have: an order of threads, blocks with several rows, a full table of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_cross_entropy as on_cpu
import test_cross_entropy_metrics as metrics_on_cpu
import torch
import torch.nn.functional as F
from cuda_on_cpu.emulator import DEVICES, Kernels
from oracle import DTYPES, assert_within_one_ulp, cross_entropy_oracle, logits_of_kind
from test_clip_grad_norm import test_the_product_has_the_bits_of_torchs  # noqa: F401
from test_cross_entropy import (  # noqa: F401 - collected here, where the fixtures replace kernels
    test_all_ignored,
    test_any_upstream_gradient,
    test_ignore_index_may_be_any_number,
    test_inplace_leaves_what_is_outside_its_view_alone,
    test_inplace_with_the_class_dimension_moved_to_the_middle,
    test_inplace_writes_over_the_logits_and_says_so,
    test_log_sum_exp_minus_logit_does_not_cancel,
    test_masked_target_has_infinite_loss_as_in_torch,
    test_nan_and_inf_poison_their_row_as_in_torch,
    test_no_gradient_wanted,
    test_oracle_loss_and_gradient,
    test_oracle_options_and_reductions,
    test_rows_further_apart_than_2_to_the_31_elements,
    test_second_backward_over_a_retained_graph_is_the_same,
    test_shapes_are_torchs,
)
from test_cross_entropy_metrics import (  # noqa: F401
    test_constant_rows_are_not_all_correct,
    test_metrics_add_and_are_no_part_of_the_graph,
    test_one_token_has_scalars,
    test_oracle_of_sums,
    test_oracle_of_sums_with_probabilities,
    test_oracle_of_tokens,
    test_oracle_of_tokens_at_infinity,
)
from test_tensor_stats import (  # noqa: F401
    check,
    test_accumulates_into_a_given_histogram,
    test_layouts,
    test_oracle_every_float16_and_bfloat16_value,
    test_oracle_mixed_list_with_empties,
    test_oracle_statistics_and_histogram,
    test_without_histogram,
)
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy, tensor_stats


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(31)


# The tests that meet every way of the fused kernel, and those that meet the three that read rows
# differently; all others run on the first device only.
ON_EVERY_DEVICE = (
    "test_all_ignored",
    "test_any_order_of_threads_and_blocks_gives_the_same_bits",
    "test_every_alignment_of_logits_and_gradient",
    "test_fused_metrics",
    "test_masked_target_has_infinite_loss_as_in_torch",
    "test_nan_and_inf_poison_their_row_as_in_torch",
)
ON_THREE_DEVICES = (
    "test_blocks_that_take_several_rows",
    "test_oracle_loss_and_gradient",
    "test_oracle_options_and_reductions",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.function.__name__
    if name in ON_EVERY_DEVICE:
        metafunc.parametrize("device", DEVICES, indirect=True)
    elif name in ON_THREE_DEVICES:
        metafunc.parametrize("device", list(DEVICES)[:3], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "large")


@pytest.fixture(autouse=True)
def cuda_kernels(kernels: Kernels, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # In the place of 50257: odd, and two whole tiles of the block (8192 16-bit elements) and more.
    monkeypatch.setattr(on_cpu, "CLASSES", (1, 10, 17, 2049, 20011))
    monkeypatch.setattr(metrics_on_cpu, "CLASSES", (1, 3, 17, 2049))
    kernels.schedule("forward")
    kernels.set_device(device)
    with kernels.installed():
        yield
    kernels.set_device("large")


def everything(logits: Tensor, target: Tensor, **options: object) -> tuple[Tensor, ...]:
    """Loss, metrics, and the gradients of both modes."""
    results: list[Tensor] = []
    for mode in ("recompute", "fused"):
        x = logits.clone().requires_grad_()
        loss, metrics = cross_entropy(
            x, target, return_metrics=True, **on_cpu.MODES[mode], **options
        )
        loss.sum().backward()
        results += [loss.detach(), metrics.sums, x.grad]
    return tuple(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(dtype, kernels, generator):
    """GPT-2's 50257 classes (1 mod 8: every row at another alignment), and rows within a tile."""
    for rows, classes in ((3, 50257), (40, 33)):
        logits = logits_of_kind("wide", rows, classes, dtype, generator)
        target = on_cpu.targets(rows, classes, generator)
        results = []
        for order, workers in (("forward", 1), ("shuffled", 3)):
            kernels.schedule(order, workers)
            results.append(everything(logits, target, label_smoothing=0.1, z_loss=1e-3))
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_blocks_that_take_several_rows(reduction, kernels, generator):
    """515 rows of 5 classes, a third ignored: more for each warp or block than results are kept."""
    logits = torch.randn(515, 5, generator=generator)
    target = torch.randint(5, (515,), generator=generator, dtype=torch.int32)
    target[torch.rand(515, generator=generator) < 0.3] = -100
    kernels.schedule("shuffled", 2)
    x = logits.double().requires_grad_()
    expected = F.cross_entropy(x, target.long(), reduction=reduction)
    expected.sum().backward()
    loss, sums, grad, fused_loss, fused_sums, fused_grad = everything(
        logits, target, reduction=reduction
    )
    for got in (loss, fused_loss):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for got in (grad, fused_grad):
        torch.testing.assert_close(got.double(), x.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(fused_sums, sums, rtol=1e-13, atol=1e-13)
    counts = target != -100
    metrics = CrossEntropyMetrics(sums)
    assert metrics.tokens == counts.sum()
    assert metrics.correct == (logits.argmax(1) == target)[counts].sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment_of_logits_and_gradient(dtype, generator):
    """Rows at every offset from 16 bytes; the gradient, a new tensor, lies at another one.

    The order of additions depends on the alignment, so results agree to rounding, not to the bit.
    """
    for classes in (33, 2060):
        base = logits_of_kind("normal", 4, classes + 20, dtype, generator)
        target = torch.randint(classes, (4,), generator=generator)
        for start in range(9):
            view = base[:, start : start + classes]
            for mode in ("recompute", "fused"):
                oracle = cross_entropy_oracle(view, target, torch.ones(4))
                x = view.detach().requires_grad_()
                loss = cross_entropy(x, target, reduction="none", **on_cpu.MODES[mode])
                (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
                assert_within_one_ulp(loss.detach(), oracle.loss, torch.full((4,), 3e-6))
                assert_within_one_ulp(gradient, oracle.gradient, oracle.internal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_metrics(dtype, generator):
    """Against those of the recompute mode, which test_oracle_metrics holds to the oracle."""
    for classes in (1, 1000, 20011):
        logits = logits_of_kind("normal", 40, classes, dtype, generator) * 3
        target = torch.where(
            torch.arange(40) % 2 == 0, logits.argmax(1), torch.arange(40) % classes
        )
        target[::7] = -100
        _, wanted = cross_entropy(logits, target, label_smoothing=0.3, return_metrics=True)
        x = logits.clone().requires_grad_()
        _, got = cross_entropy(x, target, label_smoothing=0.3, return_metrics=True, fused=True)
        torch.testing.assert_close(got.sums, wanted.sums, rtol=1e-6, atol=1e-6)
        whole_numbers = [0, 1, *range(8, 38)]  # tokens, correct, and calibration's two counts
        assert torch.equal(got.sums[whole_numbers], wanted.sums[whole_numbers])


def test_large_rows_after_small_ones(kernels, generator):
    """Each shape asks for its shared memory once, and keeps it: 88 KB, 44 KB, 88 KB again."""
    kernels.set_device("no clusters")
    for classes in (22_000, 11_000, 22_000):
        x = torch.randn(2, classes, generator=generator, requires_grad=True)
        target = torch.tensor([3, classes - 1])
        (got,) = torch.autograd.grad(cross_entropy(x, target, fused=True), x)
        (wanted,) = torch.autograd.grad(F.cross_entropy(x, target), x)
        torch.testing.assert_close(got, wanted)


H100 = (227 * 1024, 16)
A100 = (163 * 1024, 1)
RTX = (99 * 1024, 1)


@pytest.mark.parametrize(
    ("gpu", "element_size", "classes", "path", "cluster"),
    [
        (H100, 2, 1024, "warp", 1),
        (H100, 4, 1024, "warp", 1),
        (H100, 2, 4096, "warp", 1),
        (H100, 2, 4097, "on chip", 1),
        (H100, 2, 16_384, "on chip", 1),
        (H100, 2, 32_768, "on chip", 1),
        (H100, 2, 50_257, "on chip", 1),
        (H100, 2, 128_256, "on chip", 4),
        (H100, 2, 262_144, "on chip", 8),
        (H100, 4, 32_000, "on chip", 2),
        (H100, 4, 128_256, "on chip", 8),
        (H100, 4, 262_144, "on chip", 16),
        (H100, 4, 524_288, "streaming", 1),
        (A100, 2, 32_768, "on chip", 1),
        (A100, 2, 50_257, "on chip", 1),
        (A100, 2, 128_256, "streaming", 1),
        (RTX, 2, 32_768, "on chip", 1),
        (RTX, 4, 32_768, "streaming", 1),
    ],
)
def test_plan_for_a_row(gpu, element_size, classes, path, cluster, kernels):
    """Rows of a power of two or odd; all rows of a logits tensor where they begin on a vector."""
    for aligned in (True, False):
        plan = kernels.fused_plan(classes, element_size, aligned, *gpu)
        assert plan[:2] == (path, cluster)


@pytest.mark.parametrize("gpu", [H100, A100, RTX, (48 * 1024, 8), (0, 1)], ids=str)
@pytest.mark.parametrize("element_size", [2, 4])
def test_every_plan_holds_its_row(gpu, element_size, kernels):
    """Wherever it begins, within the device's shared memory."""
    lanes = 16 // element_size
    for classes in (*range(1, 40), *(2**k + d for k in range(6, 22) for d in (-1, 0, 1, 7))):
        for aligned in (True, False):
            path, cluster, part, tiles, shared = kernels.fused_plan(
                classes, element_size, aligned, *gpu
            )
            if path == "streaming":
                continue
            assert cluster * part * lanes >= classes + (0 if aligned else lanes - 1)
            assert shared + 10 * 1024 <= gpu[0]
            threads = 32 if path == "warp" else 256
            assert shared == -(-part // threads) * 256 * 16
            assert tiles == -(-part // (threads * 4)) <= 8
            assert cluster <= gpu[1]


def test_clipping_more_tensors_than_one_table_holds(kernels, generator):
    kernels.schedule("shuffled", 2)
    tensors = [torch.randn(t % 5, generator=generator) for t in range(1001)]
    tensors += [torch.randn(70_000, generator=generator).bfloat16(), torch.zeros(0)]
    for coefficient in (1.0, 0.3377):
        factor = torch.tensor(coefficient)
        wanted = [tensor * factor for tensor in tensors]
        torch.ops.pyvizllm.scale_(tensors, factor.double())
        assert all(
            torch.equal(got, expected) for got, expected in zip(tensors, wanted, strict=True)
        )


def test_more_tensors_than_one_table_holds(kernels, generator):
    """1283 tensors, empties in between and last; tables of 1280 travel as kernel parameters."""
    kernels.schedule("shuffled", 2)
    tensors = [torch.randn(t % 5, generator=generator) for t in range(1281)]
    tensors += [torch.randn(70_000, generator=generator).bfloat16(), torch.zeros(0)]
    check(tensor_stats(tensors), tensors)
