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
import torch
import torch.nn.functional as F
from cuda_on_cpu.emulator import Kernels
from oracle import DTYPES, assert_within_one_ulp, cross_entropy_oracle, logits_of_kind
from test_cross_entropy import (  # noqa: F401 - collected here, where the fixtures replace kernels
    test_all_ignored,
    test_any_upstream_gradient,
    test_constant_rows_are_not_all_correct,
    test_ignore_index_may_be_any_number,
    test_inplace_leaves_what_is_outside_its_view_alone,
    test_inplace_writes_over_the_logits_and_says_so,
    test_masked_target_has_infinite_loss_as_in_torch,
    test_metrics_add_and_are_no_part_of_the_graph,
    test_nan_and_inf_poison_their_row_as_in_torch,
    test_oracle_loss_and_gradient,
    test_oracle_metrics,
    test_oracle_options_and_reductions,
    test_rows_further_apart_than_2_to_the_31_elements,
    test_second_backward_over_a_retained_graph_is_the_same,
    test_shapes_are_torchs,
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


@pytest.fixture(autouse=True)
def cuda_kernels(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # In the place of 50257: odd, and two whole tiles of the block (8192 16-bit elements) and more.
    monkeypatch.setattr(on_cpu, "CLASSES", (1, 10, 17, 2049, 20011))
    kernels.schedule("forward")
    with kernels.installed():
        yield


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
    """4099 rows: three more than there are blocks, of 5 classes, a third of them ignored."""
    logits = torch.randn(4099, 5, generator=generator)
    target = torch.randint(5, (4099,), generator=generator, dtype=torch.int32)
    target[torch.rand(4099, generator=generator) < 0.3] = -100
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


def test_more_tensors_than_one_table_holds(kernels, generator):
    """1003 tensors, empties in between and last; tables of 1000 travel as kernel parameters."""
    kernels.schedule("shuffled", 2)
    tensors = [torch.randn(t % 5, generator=generator) for t in range(1001)]
    tensors += [torch.randn(70_000, generator=generator).bfloat16(), torch.zeros(0)]
    check(tensor_stats(tensors), tensors)
