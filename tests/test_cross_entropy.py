"""cross_entropy against a float64 oracle computed from the same inputs.

Classes: 1 (all probability on one), 10 (less than a vector), 16 and 17 (a vector, and one more),
1000, 2049 (a block and one more), 50257 (GPT-2: odd, 1 mod 8).
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    LOGIT_KINDS,
    assert_within_one_ulp,
    cross_entropy_oracle,
    logits_of_kind,
)
from torch import Tensor

from pyvizllm.ops import cross_entropy
from pyvizllm.ops.cross_entropy_autograd import FewLogits

MODES = {
    "recompute": {},
    "few logits": {},  # the same for the caller
    "fused": {"fused": True},
    "inplace": {"fused": True, "inplace": True},
}
BY_ROW = [mode for mode in MODES if mode != "few logits"]  # of a loss that is reduced alone
CLASSES = (1, 10, 16, 17, 1000, 2049, 50257)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(17)


@pytest.fixture(autouse=True)
def size_decides_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few logits or many: the mode says it."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "mode" in parameters:
        few = parameters["mode"] == "few logits"
        monkeypatch.setattr(FewLogits, "MOST", 2**60 if few else 0)


def targets(rows: int, classes: int, generator: torch.Generator, ignored: int = 1) -> Tensor:
    target = torch.randint(classes, (rows,), generator=generator)
    target[:ignored] = -100
    return target


class Producer(torch.autograd.Function):
    """A model in small: returns logits that are no leaf, and keeps the gradient they get."""

    @staticmethod
    def forward(ctx, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def run(logits: Tensor, target: Tensor, upstream: Tensor, mode: str, **options):
    """Loss and gradient of logits for an upstream gradient."""
    parameter = torch.zeros_like(logits, requires_grad=True)
    loss = cross_entropy(Producer.apply(parameter, logits), target, **MODES[mode], **options)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), parameter.grad


def test_oracle_is_torch_in_float64(generator):
    """The oracle itself, against torch's autograd."""
    logits = logits_of_kind("wide", 6, 33, torch.float64, generator)
    target = targets(6, 33, generator)
    upstream = torch.randn(6, generator=generator, dtype=torch.float64)
    x = logits.clone().requires_grad_()
    loss = F.cross_entropy(x, target, reduction="none", label_smoothing=0.2)
    loss = loss + 1e-3 * torch.where(target != -100, x.logsumexp(1) ** 2, 0.0)
    loss.backward(upstream)
    oracle = cross_entropy_oracle(logits, target, upstream, label_smoothing=0.2, z_loss=1e-3)
    torch.testing.assert_close(oracle.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(oracle.gradient, x.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", BY_ROW)
@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_loss_and_gradient(dtype, kind, mode, generator):
    for classes in CLASSES:
        logits = logits_of_kind(kind, 7, classes, dtype, generator)
        target = targets(7, classes, generator)
        if kind == "masked":
            target = target.where(target == -100, 0)  # a masked target has an infinite loss
        # The fused modes apply the upstream gradient after rounding: they promise one rounding
        # for an upstream gradient of 1.
        upstream = torch.randn(7, generator=generator).to(dtype)
        if mode in ("fused", "inplace"):
            upstream = torch.ones(7, dtype=dtype)
        oracle = cross_entropy_oracle(logits, target, upstream)
        loss, gradient = run(logits, target, upstream, mode, reduction="none")
        assert loss.dtype == gradient.dtype == dtype
        largest = logits.double().abs().where(logits.isfinite(), 0).amax(1)
        spread = largest + logits.double().amax(1).abs() + 16  # bounds |x_t - max| and log(classes)
        assert_within_one_ulp(loss, oracle.loss, spread * 2.0**-24)
        assert_within_one_ulp(gradient, oracle.gradient, oracle.internal)


@pytest.mark.parametrize(
    ("reduction", "mode"), [*product(["mean", "sum"], MODES), *product(["none"], BY_ROW)]
)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_options_and_reductions(dtype, options, reduction, mode, generator):
    for classes in (10, 2049):
        logits = logits_of_kind("normal", 9, classes, dtype, generator)
        target = targets(9, classes, generator, ignored=2)
        upstream = torch.tensor(1.0)
        if reduction == "none":
            upstream = upstream.expand(9)  # stride 0, as .sum() makes it
        oracle = cross_entropy_oracle(logits, target, upstream, reduction=reduction, **options)
        loss, gradient = run(logits, target, upstream, mode, reduction=reduction, **options)
        expected = oracle.loss
        if reduction != "none":
            expected = expected.sum() / (7 if reduction == "mean" else 1)
        assert_within_one_ulp(loss, expected, torch.full_like(expected, 2e-5))
        assert_within_one_ulp(gradient, oracle.gradient, oracle.internal)


def test_lesser_instruction_sets_meet_the_oracle():
    """Each in a process that is told to use them; the best one is that of the others here."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", NUMERIC, *map(str, ORACLE_TESTS)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in ("default", "avx2")
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


# NaN, Inf and alignment too: each instruction set has its own maximum, exp and loads. Without the
# test that starts the process, whose name has the word too: each would start the next for ever.
NUMERIC = (
    "not instruction_set and not few and (oracle or nan or masked or cancel or strides or layouts)"
)
ORACLE_TESTS = [
    os.path.join(os.path.dirname(__file__), name)
    for name in (
        "test_cross_entropy.py",
        "test_cross_entropy_kernels.py",
        "test_cross_entropy_metrics.py",
        "test_cross_entropy_positions.py",
        "test_tensor_stats.py",
    )
]


@pytest.mark.parametrize("mode", BY_ROW)
def test_log_sum_exp_minus_logit_does_not_cancel(mode, generator):
    """Near 2^24, where neighbouring float32 are 2 apart, log-sum-exp itself rounds to the logit."""
    logits = torch.randn(8, 1000, generator=generator) * 5 + 2.0**24
    target = torch.randint(1000, (8,), generator=generator)
    x = logits.double().requires_grad_()
    expected = F.cross_entropy(x, target, reduction="none")
    expected.sum().backward()
    loss, gradient = run(logits, target, torch.ones(8), mode, reduction="none")
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", BY_ROW)
def test_nan_and_inf_poison_their_row_as_in_torch(mode):
    logits = torch.randn(6, 40)
    logits[1, 3] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, :37] = torch.nan  # whole vectors of NaN
    target = torch.tensor([0, 1, 2, 3, 39, 5])
    x = logits.clone().requires_grad_()
    expected = F.cross_entropy(x, target, reduction="none")
    expected.sum().backward()
    loss, gradient = run(logits, target, torch.ones(6), mode, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
    torch.testing.assert_close(gradient, x.grad, equal_nan=True)
    assert loss.isnan().tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("mode", BY_ROW)
def test_masked_target_has_infinite_loss_as_in_torch(mode):
    logits = torch.randn(3, 5000)
    logits[:, 4000:] = -torch.inf
    logits[2, :2048] = -torch.inf  # a whole block of -inf before any finite logit
    target = torch.tensor([4500, 2, 3000])
    x = logits.clone().requires_grad_()
    expected = F.cross_entropy(x, target, reduction="none", label_smoothing=0.0)
    expected.sum().backward()
    loss, gradient = run(logits, target, torch.ones(3), mode, reduction="none")
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, x.grad)
    smoothed = cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    assert smoothed.isposinf().all()


@pytest.mark.parametrize("mode", MODES)
def test_all_ignored(mode):
    logits, target = torch.randn(4, 9), torch.full((4,), -100)
    loss, gradient = run(logits, target, torch.tensor(1.0), mode)
    assert loss.isnan()
    assert (gradient == 0).all()
    loss, _ = run(logits, target, torch.tensor(1.0), mode, reduction="sum")
    assert loss == 0


@pytest.mark.parametrize("mode", MODES)
def test_ignore_index_may_be_any_number(mode, generator):
    for ignore_index in (-1, 3, 255):
        logits = torch.randn(6, 5, generator=generator)
        target = torch.tensor([0, 4, ignore_index, 2, ignore_index, 1])
        x = logits.clone().requires_grad_()
        expected = F.cross_entropy(x, target, ignore_index=ignore_index)
        expected.backward()
        loss, gradient = run(logits, target, torch.tensor(1.0), mode, ignore_index=ignore_index)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, x.grad)


SHAPES = [
    ((5,), ()),
    ((4, 5), (4,)),
    ((2, 5, 3), (2, 3)),
    ((2, 5, 3, 4), (2, 3, 4)),
    ((0, 5), (0,)),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("shape", "target_shape"), SHAPES, ids=str)
def test_shapes_are_torchs(shape, target_shape, reduction, generator):
    logits = torch.randn(shape, generator=generator, requires_grad=True)
    target = torch.randint(5, target_shape, generator=generator)
    for mode in ("recompute", "fused"):
        expected = F.cross_entropy(logits, target, reduction=reduction)
        loss = cross_entropy(logits, target, reduction=reduction, **MODES[mode])
        torch.testing.assert_close(loss, expected, equal_nan=True)
        upstream = torch.randn(loss.shape, generator=generator)
        (got,) = torch.autograd.grad(loss, logits, upstream)
        (wanted,) = torch.autograd.grad(expected, logits, upstream)
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_strides_and_alignment(generator):
    """Row strides that are not the classes, rows that start anywhere, transposed classes."""
    base = torch.randn(6, 120, generator=generator)
    target = torch.randint(33, (6,), generator=generator)
    for start in range(1, 9):
        view = base[:, start : start + 33]
        expected = cross_entropy(view.clone(), target, reduction="none")
        assert torch.equal(cross_entropy(view, target, reduction="none"), expected)
    transposed = base[:, :33].t().contiguous().t()
    expected = cross_entropy(base[:, :33].clone(), target)
    assert torch.equal(cross_entropy(transposed, target), expected)
    assert torch.equal(cross_entropy(base[:, :33], target.repeat_interleave(2)[::2]), expected)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(cross_entropy(base[:, :33], target.to(dtype)), expected)


def test_inplace_leaves_what_is_outside_its_view_alone(generator):
    """41 misaligned windows into a buffer of sentinels."""
    target = torch.randint(33, (4,), generator=generator)
    for start in range(41):
        buffer = torch.full((4, 80), 7.5)
        logits = torch.randn(4, 33, generator=generator)
        x = logits.clone().requires_grad_()
        cross_entropy(x, target).backward()
        buffer[:, start : start + 33] = logits
        view = Share.apply(torch.zeros((), requires_grad=True), buffer)[:, start : start + 33]
        cross_entropy(view, target, fused=True, inplace=True)
        torch.testing.assert_close(buffer[:, start : start + 33], x.grad)
        assert (buffer[:, :start] == 7.5).all()
        assert (buffer[:, start + 33 :] == 7.5).all()


class Share(torch.autograd.Function):
    """Like Producer, over the caller's own memory."""

    @staticmethod
    def forward(ctx, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


def test_inplace_writes_over_the_logits_and_says_so(generator):
    parameter = torch.randn(4, 9, generator=generator, requires_grad=True)
    target = torch.randint(9, (4,), generator=generator)
    logits = parameter * 1.0
    version = logits._version
    loss = cross_entropy(logits, target, fused=True, inplace=True)
    assert logits._version > version
    written = logits.detach().clone()
    loss.backward()
    assert torch.equal(parameter.grad, written)
    # An operation that saved the logits must find out.
    logits = parameter * 1.0
    squared = (logits**2).sum()
    loss = cross_entropy(logits, target, fused=True, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squared).backward()


@pytest.mark.parametrize("mode", MODES)
def test_second_backward_over_a_retained_graph_is_the_same(mode, generator):
    parameter = torch.randn(5, 70, generator=generator, requires_grad=True)
    target = torch.randint(70, (5,), generator=generator)
    for upstream in (torch.tensor(1.0), torch.tensor(0.3)):
        loss = cross_entropy(parameter * 1.0, target, **MODES[mode])
        (got,) = torch.autograd.grad(loss, parameter, upstream, retain_graph=True)
        first = got.clone()
        got.zero_()  # as whoever gets it may
        (second,) = torch.autograd.grad(loss, parameter, upstream)
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("reduction", "mode"), [*product(["sum"], MODES), *product(["none"], BY_ROW)]
)
def test_upstream_gradients_differ_from_backward_to_backward(mode, reduction, generator):
    """Each is applied to the gradient for 1, not to one that another was applied to before."""
    x = torch.randn(5, 70, generator=generator, requires_grad=True)
    target = torch.randint(70, (5,), generator=generator)
    padded = F.pad(x, (1, 2)) * 1.0
    for logits in (x * 1.0, padded[:, 1:-2]):  # rows that follow each other, and that do not
        expected = F.cross_entropy(x, target, reduction=reduction)
        loss = cross_entropy(logits, target, reduction=reduction, **MODES[mode])
        for factor, retain in ((1.0, True), (0.3, True), (-2.0, True), (0.7, False)):
            upstream = factor * torch.ones_like(loss)
            if reduction == "none":
                upstream *= torch.arange(1, 6)
            (wanted,) = torch.autograd.grad(expected, x, upstream, retain_graph=True)
            (got,) = torch.autograd.grad(loss, x, upstream, retain_graph=retain)
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_logits_have_the_gradients_of_many(dtype, generator, monkeypatch):
    logits = torch.randn(5, 70, generator=generator).to(dtype)
    target = torch.randint(70, (5,), generator=generator)
    upstream = torch.tensor(0.3)
    for options in ({}, {"label_smoothing": 0.1, "weight": torch.rand(70).to(dtype)}):
        gradients = []
        for most in (logits.numel(), logits.numel() - 1):
            monkeypatch.setattr(FewLogits, "MOST", most)
            gradients.append(run(logits, target, upstream, "recompute", **options)[1])
            x = logits.clone().requires_grad_()
            loss = cross_entropy(x, target, **options)
            (first,) = torch.autograd.grad(loss, x, upstream.to(dtype), create_graph=True)
            gradients += torch.autograd.grad(first.square().sum(), x)
        few, second_of_few, many, second_of_many = gradients
        assert torch.equal(few, many)
        assert torch.equal(second_of_few, second_of_many)


def test_inplace_scales_nothing_outside_its_view(generator):
    """The upstream gradient is applied to the rows alone, not to what lies between them."""
    x = torch.randn(5, 73, generator=generator, requires_grad=True)
    around = x * 1.0
    outside = around.detach()[:, 70:].clone()
    target = torch.arange(5)
    cross_entropy(around[:, :70], target, fused=True, inplace=True).backward(torch.tensor(0.3))
    assert torch.equal(around.detach()[:, 70:], outside)
    (wanted,) = torch.autograd.grad(F.cross_entropy(x[:, :70], target), x)
    torch.testing.assert_close(x.grad, 0.3 * wanted)


@pytest.mark.parametrize("mode", ["fused", "inplace"])
def test_an_upstream_gradient_of_1_writes_nothing(mode, generator):
    """And any other is applied in place: the gradient has the logits' or the kernel's memory."""
    x = torch.randn(5, 70, generator=generator, requires_grad=True)
    kept: list[Tensor] = []
    logits = x * 1.0
    logits.register_hook(kept.append)
    loss = cross_entropy(logits, torch.arange(5), **MODES[mode])
    before = logits.detach().clone()
    loss.backward()
    if mode == "inplace":
        assert kept[0].data_ptr() == logits.data_ptr()
        assert torch.equal(kept[0], before)
    x.grad, logits = None, x * 1.0
    logits.register_hook(kept.append)
    (cross_entropy(logits, torch.arange(5), **MODES[mode]) * 3).backward()
    torch.testing.assert_close(kept[1], 3 * before if mode == "inplace" else 3 * kept[0])
    if mode == "inplace":
        assert kept[1].data_ptr() == logits.data_ptr()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the kernel in a loop
@pytest.mark.parametrize("mode", MODES)
def test_upstream_gradients_of_vmap(mode, generator):
    """As torch.autograd.functional.jacobian does it, but by torch.func's vmap."""
    x = torch.randn(3, 7, generator=generator, requires_grad=True)
    target = torch.tensor([1, 6, 0])
    upstream = torch.tensor([1.0, 2.0])

    def gradients(loss: Tensor) -> Tensor:
        return torch.func.vmap(lambda u: torch.autograd.grad(loss, x, u, retain_graph=True)[0])(
            upstream
        )

    loss = cross_entropy(x * 1.0, target, **MODES[mode])
    torch.testing.assert_close(gradients(loss), gradients(F.cross_entropy(x, target)))


def test_batched_upstream_gradients(generator):
    """As torch.autograd.functional.jacobian(vectorize=True) gives them."""
    x = torch.randn(3, 7, generator=generator, requires_grad=True)
    target = torch.tensor([1, 6, 0])
    for reduction, shape in (("none", (2, 3)), ("sum", (2,))):
        upstream = torch.randn(shape, generator=generator)
        loss = cross_entropy(x, target, reduction=reduction, fused=True)
        expected = F.cross_entropy(x, target, reduction=reduction)
        (got,) = torch.autograd.grad(loss, x, upstream, is_grads_batched=True)
        (wanted,) = torch.autograd.grad(expected, x, upstream, is_grads_batched=True)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_any_upstream_gradient(mode, generator):
    logits = torch.randn(5, 70, generator=generator)
    target = torch.randint(70, (5,), generator=generator)
    for reduction, upstream in (
        ("none", torch.randn(5, generator=generator)),
        ("none", torch.randn(10, generator=generator)[::2]),
        ("none", torch.tensor(0.7).expand(5)),
        ("mean", torch.tensor(0.7)),
        ("sum", torch.tensor(-3.0)),
    ):
        x = logits.clone().requires_grad_()
        F.cross_entropy(x, target, reduction=reduction).backward(upstream)
        _, gradient = run(logits, target, upstream, mode, reduction=reduction)
        torch.testing.assert_close(gradient, x.grad)


def test_second_derivative(generator):
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 5, 0])
    for reduction in ("none", "mean", "sum"):

        def loss(x, reduction=reduction):
            return cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, z_loss=1e-2)

        assert torch.autograd.gradcheck(loss, (x,))
        assert torch.autograd.gradgradcheck(loss, (x,))
    for mode in ("fused", "inplace"):
        value = cross_entropy(x * 1.0, target, **MODES[mode])
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, x, create_graph=True)


def test_same_result_for_any_number_of_threads(generator):
    logits = torch.randn(300, 1003, generator=generator)
    target = torch.randint(1003, (300,), generator=generator)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            loss, metrics = cross_entropy(x, target, return_metrics=True, label_smoothing=0.1)
            loss.backward()
            results.append((loss.detach(), metrics.sums, x.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_further_apart_than_2_to_the_31_elements(generator):
    """A view into memory of which only the three rows are ever touched."""
    stride = 2**31 + 7
    memory = torch.empty(2 * stride + 1000, dtype=torch.bfloat16)
    view = memory.as_strided((3, 1000), (stride, 1))
    view.copy_(torch.randn(3, 1000, generator=generator))
    target = torch.tensor([5, -100, 999])
    x = view.float().requires_grad_()
    expected = F.cross_entropy(x, target)
    expected.backward()
    logits = Share.apply(torch.zeros((), requires_grad=True), view)
    torch.testing.assert_close(
        cross_entropy(logits, target).float(), expected.detach(), rtol=4e-3, atol=0
    )
    cross_entropy(logits, target, fused=True, inplace=True)
    torch.testing.assert_close(view.float(), x.grad, rtol=4e-3, atol=1e-9)


def test_autocast_returns_float32_from_low_precision_logits(generator):
    logits = torch.randn(4, 9, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(9, (4,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(logits, target)
        assert loss.dtype == F.cross_entropy(logits, target).dtype == torch.float32
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.detach().float(), target), rtol=1e-6, atol=1e-6
    )
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", BY_ROW)
def test_compiles_without_a_graph_break(mode, generator):
    torch._dynamo.reset()

    def step(x, target):
        return cross_entropy(x * 2.0, target, **MODES[mode])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        x = torch.randn(rows, 9, generator=generator, requires_grad=True)
        target = torch.randint(9, (rows,), generator=generator)
        loss = compiled(x, target)
        (gradient,) = torch.autograd.grad(loss, x)
        expected = F.cross_entropy(x * 2.0, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("probabilities", [False, True])
def test_operators_keep_torchs_contracts(probabilities, wanted, generator):
    x = torch.randn(4, 9, generator=generator, requires_grad=True)
    target = torch.randint(9, (4,), generator=generator)
    if probabilities:
        target = torch.rand(4, 9, generator=generator)
    weight = torch.rand(9, generator=generator)
    options = (-100, 0.1, 1e-3, 20.0, 0.5, 0, "mean")
    arguments = (target, weight, *options, wanted)
    ops = torch.ops.pyvizllm
    torch.library.opcheck(ops.cross_entropy_forward.default, (x, *arguments))
    torch.library.opcheck(ops.cross_entropy_fused.default, (x.detach(), *arguments))
    torch.library.opcheck(ops.cross_entropy_fused_.default, (x.detach().clone(), *arguments))
    loss, row_max, row_sum, *_ = ops.cross_entropy_forward(x.detach(), *arguments)
    torch.library.opcheck(
        ops.cross_entropy_backward.default,
        (loss, x.detach(), target, weight, row_max, row_sum, *options),
    )


def test_no_gradient_wanted(generator):
    logits = torch.randn(4, 9, generator=generator)
    target = torch.randint(9, (4,), generator=generator)
    before = logits.clone()
    loss = cross_entropy(logits, target, fused=True, inplace=True)
    assert torch.equal(logits, before)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


X = torch.zeros(4, 5)
T = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((X, T[:3]), {}, ValueError, r"Expected input batch_size \(4\) to match .* \(3\)"),
        ((X, T[:, None]), {}, RuntimeError, r"Expected target size \[4\] .* got \[4, 1\]"),
        ((X[0], T[:2]), {}, ValueError, "must have size 1, but got target size: 2"),
        ((X[0], T[:1, None]), {}, RuntimeError, r"0D or 1D target .* got shape \[1, 1\]"),
        ((X[0, 0], X[0, 0]), {}, IndexError, "at least one dimension"),
        ((X.long(), T), {}, NotImplementedError, "expected input of float32.* got torch.int64"),
        ((X.cfloat(), T), {}, NotImplementedError, "input of float32.* got torch.complex64"),
        ((X, T.to(torch.int16)), {}, RuntimeError, "to be Long or Byte .* got torch.int16"),
        ((X, T + 5), {}, IndexError, "^cross_entropy: target 5 at position 0 is out of.* < 5"),
        ((X, T - 2), {}, IndexError, "target -2 at position 0 is out of bounds"),
        ((X, T), {"reduction": "avg"}, ValueError, "'none', 'mean' or 'sum', got 'avg'"),
        ((X, T), {"label_smoothing": 1.5}, RuntimeError, "between 0.0 and 1.0. Got: 1.5"),
        ((X, T), {"inplace": True}, ValueError, "fused=True with inplace=True"),
        ((X, T), {"softcap": -1.0}, ValueError, "finite softcap of at least 0, got -1"),
        ((X, T), {"return_metrics": "all"}, ValueError, "True or 'per_token', got 'all'"),
        ((X, T, None, True), {}, TypeError, "ignore_index to be an int, got True .*by its name"),
        ((X, T, X[0, :4]), {}, RuntimeError, r"for all 5 classes .* got .* shape: \[4\]"),
        ((X, T, X[0].double()), {}, RuntimeError, r"scalar type float32 but found float64 .weight"),
        ((X, T, X[0].clone().requires_grad_()), {}, RuntimeError, "respect to argument 'weight'"),
        ((X, T, [1.0] * 5), {}, TypeError, "expected weight to be a tensor, got list"),
        ((X, X, X[0].cfloat()), {}, NotImplementedError, "real weight, got torch.complex64"),
        (([1.0], T), {}, TypeError, "expected input to be a tensor, got list"),
        ((X, 3), {}, TypeError, "expected target to be a tensor, got int"),
        ((X, X.long()), {}, RuntimeError, "Expected floating point .* got torch.int64"),
        ((X, X.to(torch.float8_e5m2)), {}, NotImplementedError, "probabilities of .*float8_e5m2"),
        ((X, X), {"ignore_index": 1}, RuntimeError, "ignore_index is not supported .*, got 1"),
        ((X, None), {}, TypeError, "expected target to be a tensor, got NoneType"),
        ((X.to_sparse(), T), {}, NotImplementedError, "a dense input, got torch.sparse_coo"),
        ((X, T.to_sparse()), {}, NotImplementedError, "a dense target, got torch.sparse_coo"),
        ((X, T.to("meta")), {}, RuntimeError, "target on input's device cpu, got meta"),
    ],
)
def test_errors_are_sentences(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        cross_entropy(*arguments, **options)


def test_out_of_bounds_names_no_source_file():
    with pytest.raises(IndexError, match=r"^cross_entropy: target 5 at"):
        cross_entropy(X, T + 5)


@pytest.mark.parametrize("mode", MODES)
def test_accumulates_over_a_retained_graph_when_only_views_are_between(mode, generator):
    """A leaf takes the gradient that comes through a view as its own, and adds to it in place."""
    leaf = torch.randn(3, 4, 5, generator=generator, requires_grad=True)
    source = leaf * 1.0 if mode == "inplace" else leaf  # in place over a leaf is refused
    source.retain_grad()
    loss = cross_entropy(source.view(12, 5), torch.arange(12) % 5, **MODES[mode])
    loss.backward(retain_graph=True)
    once = source.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(source.grad, 3 * once)


def test_inplace_refuses_a_leaf_and_its_views():
    leaf = torch.zeros(4, 5, requires_grad=True)
    for logits in (leaf, leaf[:], leaf.view(2, 2, 5).flatten(0, 1)):
        with pytest.raises(RuntimeError, match="got a leaf that requires grad"):
            cross_entropy(logits, T, fused=True, inplace=True)
    assert (leaf == 0).all()


@pytest.mark.parametrize(
    ("logits", "target", "sentence"),
    [
        (lambda x: x.t(), (5,), r"class stride 1 .*got shape \[5, 4\] with strides \[1, 5\]"),
        (lambda x: x.view(2, 2, 5), (2, 5), "class stride 1 and rows one step apart"),
        (lambda x: x[:1].expand(4, 5), (4,), "rows share no memory .*clone it first"),
        (lambda x: x.as_strided((4, 5), (2, 1)), (4,), "rows share no memory"),
    ],
    ids=["transposed", "class dimension in the middle", "expanded", "overlapping"],
)
def test_inplace_refuses_rows_it_cannot_write(logits, target, sentence):
    produced = logits(torch.zeros(4, 5, requires_grad=True) * 1.0)
    with pytest.raises(ValueError, match=sentence):
        cross_entropy(produced, torch.zeros(target).long(), fused=True, inplace=True)


def test_inplace_with_the_class_dimension_moved_to_the_middle(generator):
    x = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    target = torch.randint(5, (2, 3), generator=generator)
    gradients = []
    for function, options in ((cross_entropy, MODES["inplace"]), (F.cross_entropy, {})):
        loss = function((x * 1.0).movedim(-1, 1), target, **options)
        gradients += torch.autograd.grad(loss, x)
    torch.testing.assert_close(*gradients)


def test_hooks_on_a_view_that_was_overwritten() -> None:
    """torch renews a view's place in the graph when it is asked for, which a hook does not."""
    base = torch.randn(3, 4, 5, requires_grad=True) * 1
    view = base.flatten(0, 1)
    loss = cross_entropy(view, torch.randint(5, (12,)), fused=True, inplace=True)
    seen: list[Tensor] = []
    view.register_hook(seen.append)
    base.register_hook(seen.append)
    loss.backward()
    assert [gradient.shape for gradient in seen] == [(3, 4, 5)]
