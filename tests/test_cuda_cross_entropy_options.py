"""The options of cross_entropy on the CUDA kernels, which an emulator runs (tests/cuda_on_cpu).

The imported tests are those of the CPU kernels: every dtype, kind of row, kind of target, scale,
cap, weight and smoothing against the formulas composed in float64. Those written out here compare
with the CPU kernels what is summed beside the loss, on each way through the fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_cross_entropy_kernels as on_cpu
import torch
from cuda_on_cpu.emulator import DEVICES, Kernels
from oracle import DTYPES, logits_of_kind
from test_cross_entropy_kernels import (
    test_a_row_of_nothing_but_minus_infinity_has_no_probabilities,
    test_nan_logits_are_never_correct_and_have_no_rank,
    test_oracle_of_options_and_targets,
)

OPS = torch.ops.pyvizllm
IMPORTED = (
    test_a_row_of_nothing_but_minus_infinity_has_no_probabilities,
    test_nan_logits_are_never_correct_and_have_no_rank,
    test_oracle_of_options_and_targets,
)
ROWS = 7
CASES = {
    **on_cpu.CASES,
    "a slice of the classes": on_cpu.Options(
        total_classes=70_000, label_smoothing=0.1, softcap=9.0
    ),
}
CLASSES = (1, 33, 2049)
"""One; a few vectors of a warp; a row of a warp or of a block."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def cuda_kernels(
    kernels: Kernels, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    kernels.schedule("forward")
    if request.function not in IMPORTED:
        yield
        kernels.set_device("large")
        return
    monkeypatch.setattr(on_cpu, "CLASSES", (1, 2049))
    with kernels.installed():
        yield


def arguments_of(case: str, kind: str, dtype: torch.dtype, classes: int, weighted: bool) -> tuple:
    generator = torch.Generator().manual_seed(classes)
    x = logits_of_kind("normal", ROWS, classes + 3, dtype, generator)[:, 3:] * 4
    target = on_cpu.make_targets(kind == "probabilities", x, generator)
    if kind == "elsewhere":
        target[1], target[2], target[3] = classes, -1, classes + 40_000
    weight = on_cpu.make_weight(x, generator) if weighted else None
    return x, target, weight, *CASES[case].arguments()


def close(got: torch.Tensor, wanted: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(got, wanted, equal_nan=True, **tolerance)


def assert_the_same(kernels: Kernels, arguments: tuple, dtype: torch.dtype) -> None:
    """Loss, records and metrics of both kernels, and the gradients, as those of the CPU."""
    eps = torch.finfo(dtype).eps
    loose = {"rtol": 1e-5, "atol": 1e-5}
    wanted = OPS.cross_entropy_forward(*arguments, 2)
    got = kernels.cross_entropy_forward(*arguments, 2)
    close(got[0], wanted[0], **loose)
    close(got[3], wanted[3], **loose)
    counts = wanted[4][0] == wanted[4][0]  # rows that do not count have no maximum
    for a, b in zip(got[1:3], wanted[1:3], strict=True):
        close(a[counts], b[counts], **loose)
    close(got[4], wanted[4], rtol=1e-5, atol=1e-5 * arguments[0].shape[1] ** 0.5)
    close(got[4][5], wanted[4][5], rtol=0, atol=0)  # ranks
    close(got[3][[0, 1, 6]], wanted[3][[0, 1, 6]], rtol=0, atol=0)  # tokens, correct, top 5
    loss, gradient, sums, records = kernels.cross_entropy_fused(*arguments, 2)
    _, wanted_gradient, _, _ = OPS.cross_entropy_fused(*arguments, 2)
    close(loss, got[0], rtol=1e-6, atol=1e-6)
    # Parts of a row add in another order.
    close(sums, got[3], rtol=1e-6, atol=1e-6)
    close(records, got[4], rtol=1e-6, atol=1e-6 * arguments[0].shape[1] ** 0.5)
    close(records[5], got[4][5], rtol=0, atol=0)
    # Where p and q nearly cancel, the rounding of either is left: of numbers up to 1.7.
    cancelled = 2 * 1.7 * 2.0**-24
    close(gradient, wanted_gradient, rtol=2 * eps + 1e-5, atol=cancelled)
    over = arguments[0].clone()
    kernels.cross_entropy_fused_(over, *arguments[1:], 0)
    assert torch.equal(over, gradient)
    upstream = torch.ones_like(loss)
    backward = OPS.cross_entropy_backward(upstream, *arguments[:3], *wanted[1:3], *arguments[3:])
    mine = kernels.cross_entropy_backward(upstream, *arguments[:3], *got[1:3], *arguments[3:])
    close(mine, backward, rtol=2 * eps + 1e-5, atol=cancelled)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_records_metrics_and_gradients_are_the_cpus(case, dtype, classes, kernels):
    """Indices and probabilities, with class weights and without."""
    kinds = ("index", "elsewhere") if CASES[case].total_classes else ("index", "probabilities")
    for kind in kinds:
        for weighted in (False, True)[: 1 if CASES[case].total_classes else 2]:
            arguments = arguments_of(case, kind, dtype, classes, weighted)
            assert_the_same(kernels, arguments, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_every_way_of_the_fused_kernel(kind, device, kernels):
    kernels.set_device(device)
    for order in ("forward", "shuffled"):
        kernels.schedule(order)
        for classes in (33, 20_011):
            arguments = arguments_of("all", kind, torch.bfloat16, classes, True)
            assert_the_same(kernels, arguments, torch.bfloat16)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_what_the_mean_divides_by(kind, reduction, kernels):
    """515 rows: more than blocks keep at once; the weights of targets, or the rows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(515, 5, generator=generator)
    target = on_cpu.make_targets(kind == "probabilities", x, generator)
    if kind == "index":
        target[torch.rand(515, generator=generator) < 0.3] = -100
    weight = on_cpu.make_weight(x, generator)
    leaf = x.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(
        leaf,
        target.double() if kind == "probabilities" else target,
        weight.double(),
        reduction=reduction,
        label_smoothing=0.2,
    )
    wanted.backward()
    arguments = (x, target, weight, -100, 0.2, 0.0, 0.0, 1.0, 0, reduction)
    loss, row_max, row_sum, _, _ = kernels.cross_entropy_forward(*arguments, 0)
    fused_loss, gradient, _, _ = kernels.cross_entropy_fused(*arguments, 0)
    backward = kernels.cross_entropy_backward(
        torch.ones(()), x, target, weight, row_max, row_sum, *arguments[3:]
    )
    for got in (loss, fused_loss):
        close(got.double(), wanted.detach(), rtol=2e-7, atol=0)
    for got in (gradient, backward):
        # Where p and q nearly cancel, the rounding of either is left.
        atol = 2e-8 if reduction == "sum" else 2e-10
        close(got.double(), leaf.grad, rtol=3e-6, atol=atol)


def test_a_masked_class_of_no_probability_or_no_weight(kernels):
    """0 log 0 is 0: neither -Inf nor NaN reaches the loss."""
    x = torch.tensor([[1.0, -torch.inf, 2.0]])
    q = torch.tensor([[0.25, 0.0, 0.75]])
    log_p = x.double().log_softmax(1)
    loss, *_ = kernels.cross_entropy_forward(x, q, None, -100, 0.0, 0.0, 0.0, 1.0, 0, "sum", 1)
    close(loss.double(), -(q * log_p)[:, [0, 2]].sum(), rtol=1e-6, atol=0)
    weight = torch.tensor([1.0, 0.0, 0.5])
    target = torch.tensor([2])
    loss, *_ = kernels.cross_entropy_forward(
        x, target, weight, -100, 0.3, 0.0, 0.0, 1.0, 0, "sum", 1
    )
    wanted = -0.7 * 0.5 * log_p[0, 2] - 0.1 * (log_p[0, 0] + 0.5 * log_p[0, 2])
    close(loss.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["plain", "capped"])
def test_a_row_with_nan_is_never_correct(case, kernels):
    x = torch.tensor([[3.0, 1.0, torch.nan, 0.0], [3.0, 1.0, 2.0, 0.0]])
    target = torch.tensor([0, 0])
    *_, sums, records = kernels.cross_entropy_forward(x, target, None, *CASES[case].arguments(), 2)
    assert sums[[0, 1, 6]].tolist() == [2, 1, 1]
    assert records[5].isnan().tolist() == [True, False]
