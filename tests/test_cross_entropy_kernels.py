"""The operators of cross_entropy against the formulas composed in float64 from the same inputs.

Called below `pyvizllm.ops`, so that all options meet all dtypes, kinds of rows and instruction
sets. Classes: 1 (no other class), 10 (less than a vector), 17 (a vector and one more), 2049 (a
block and one more).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracle import DTYPES, F32_EPS, LOGIT_KINDS, assert_within_one_ulp, logits_of_kind, seeded
from torch import Tensor

import pyvizllm

OPS = torch.ops.pyvizllm
CLASSES = (1, 10, 17, 2049)
ROWS = 6


@dataclass
class Options:
    """The operators' arguments after `weight`, in their order."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    total_classes: int = 0
    reduction: str = "none"

    def arguments(self) -> tuple:
        return (
            -100,
            self.label_smoothing,
            self.z_loss,
            self.softcap,
            self.logit_scale,
            self.total_classes,
            self.reduction,
        )


@dataclass
class Expected:
    """In float64: loss and record of each row, the gradient, and the errors float32 may make."""

    loss: Tensor  # [rows]
    loss_error: Tensor  # [rows]
    gradient: Tensor  # [rows, classes], of the sum of the rows' losses
    gradient_error: Tensor  # [rows, classes]
    z: Tensor  # [rows, classes]
    z_error: Tensor  # [rows]
    log_sum_exp: Tensor  # [rows]
    index: Tensor  # [rows]


def expected_of(x: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Expected:
    """The formulas of the module, term by term."""
    x = x.double()
    rows, classes = x.shape
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    s, scale, cap = options.label_smoothing, options.logit_scale, options.softcap
    z, slope = scale * x, torch.full_like(x, scale)
    if cap != 0:
        y = scale * x / cap
        z, slope = cap * y.tanh(), scale / y.cosh() ** 2
    distance = z - z.amax(1, keepdim=True)
    if cap == 0:  # a difference of z has lost digits where all of a row are large
        distance = scale * (x - x.gather(1, z.argmax(1, keepdim=True)))
    log_sum = distance.exp().sum(1, keepdim=True).log()
    lse = z.amax(1, keepdim=True) + log_sum
    log_p = distance - log_sum
    p = log_p.exp()
    zl = torch.full((rows, 1), options.z_loss, dtype=torch.float64)
    if target.dim() == 2:
        counts = torch.ones(rows, 1, dtype=torch.bool)
        index = target.argmax(1)
        q = w * ((1 - s) * target.double() + s / classes)
        at_target = torch.zeros_like(q, dtype=torch.bool)
    else:
        counts = (target != -100)[:, None]
        index = target.long().where(counts[:, 0], 0)
        at_target = torch.zeros_like(x, dtype=torch.bool).scatter(1, index[:, None], True)
        q = w * (at_target.double() * (1 - s) + s / classes)
        zl = zl * w[index][:, None]
    total = q.sum(1, keepdim=True)
    loss = torch.where(q == 0, 0.0, -q * log_p).sum(1, keepdim=True) + zl * lse**2
    z_factor = 2 * zl * lse
    gradient = p * (total + z_factor) - q
    # p - 1 of the target without cancellation.
    gradient = torch.where(
        at_target, total * torch.expm1(log_p) + z_factor * p + (total - q), gradient
    )
    # A cap is rounded for z and for its maximum. A distance is a difference times a scale, which
    # has been rounded itself.
    rounding = 8 * abs(cap) + torch.zeros_like(lse) + 16
    relative = F32_EPS * (3 * distance.clamp(min=-105).abs() + rounding)
    terms = p * (total + z_factor.abs()) + q + at_target.double() * total
    error = slope.abs() * terms * relative + 2.0**-148
    z_error = F32_EPS * (2 * z.abs().where(z.isfinite(), 0).amax(1) + rounding[:, 0])
    loss_error = (total + 2 * zl * lse.abs())[:, 0] * z_error * 2
    loss_error += F32_EPS * 16 * loss.abs()[:, 0].where(loss[:, 0].isfinite(), 0)
    zero = torch.zeros((), dtype=torch.float64)
    return Expected(
        torch.where(counts, loss, zero)[:, 0],
        loss_error,
        torch.where(counts, gradient * slope, zero),
        error,
        z,
        z_error,
        lse[:, 0],
        index,
    )


def every_way(x: Tensor, target: Tensor, weight: Tensor | None, options: Options):
    """(name, loss, gradient) of backward after forward, fused, and fused in place."""
    arguments = options.arguments()
    loss, row_max, row_sum, _, _ = OPS.cross_entropy_forward(x, target, weight, *arguments, 0)
    upstream = torch.ones_like(loss)
    gradient = OPS.cross_entropy_backward(upstream, x, target, weight, row_max, row_sum, *arguments)
    yield "backward", loss, gradient
    loss, gradient, _, _ = OPS.cross_entropy_fused(x, target, weight, *arguments, 0)
    yield "fused", loss, gradient
    gradient = x.clone()
    loss, _, _ = OPS.cross_entropy_fused_(gradient, target, weight, *arguments, 0)
    yield "fused_", loss, gradient


def make_targets(soft: bool, x: Tensor, generator: torch.Generator) -> Tensor:
    rows, classes = x.shape
    if soft:
        q = torch.rand(rows, classes, generator=generator).where(x.isfinite(), 0)
        return (q / q.sum(1, keepdim=True)).to(x.dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    target = target.where(x.isfinite().gather(1, target[:, None])[:, 0], 0)
    target[0] = -100
    return target


def make_weight(x: Tensor, generator: torch.Generator) -> Tensor:
    weight = torch.rand(x.shape[1], generator=generator).to(torch.float64)
    return weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


CASES = {
    "plain": Options(),
    "smoothed": Options(label_smoothing=0.2),
    "z_loss": Options(z_loss=1e-3),
    "capped": Options(softcap=15.0),
    "scaled": Options(logit_scale=0.3),
    "negative scale": Options(logit_scale=-1.7),
    "all": Options(label_smoothing=0.1, z_loss=1e-2, softcap=20.0, logit_scale=-0.7),
}


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_oracle_of_options_and_targets(case, dtype, kind):
    generator = seeded(11)
    options = CASES[case]
    if kind == "masked" and options.logit_scale < 0 and options.softcap == 0:
        pytest.skip("a masked logit becomes +Inf")
    for classes in CLASSES:
        x = logits_of_kind(kind, ROWS, classes, dtype, generator)
        if kind == "masked" and options.label_smoothing != 0 and options.softcap == 0:
            x[x.isinf()] = -50.0  # the smoothed loss of a masked class is infinite
        for soft in (False, True):
            target = make_targets(soft, x, generator)
            for weight in (None, make_weight(x, generator)):
                expected = expected_of(x, target, weight, options)
                for name, loss, gradient in every_way(x, target, weight, options):
                    assert gradient.dtype == dtype, name
                    assert_within_one_ulp(loss, expected.loss, expected.loss_error)
                    assert_within_one_ulp(gradient, expected.gradient, expected.gradient_error)


def expected_record(x: Tensor, e: Expected, linear: Tensor) -> Tensor:
    """[7, rows]; linear: the coefficients of the sum of distances, [rows, classes]."""
    classes = x.shape[1]
    distance = e.z - e.z.amax(1, keepdim=True)
    exps = distance.exp()
    at_target = e.z.gather(1, e.index[:, None])
    is_target = torch.zeros_like(e.z, dtype=torch.bool).scatter(1, e.index[:, None], True)
    before = torch.arange(classes) < e.index[:, None]
    return torch.stack(
        [
            e.z.amax(1),
            exps.sum(1),
            (exps * distance).sum(1),
            (linear * distance).sum(1),
            at_target[:, 0],
            ((e.z > at_target) | ((e.z == at_target) & before)).sum(1).double(),
            e.z.masked_fill(is_target, -torch.inf).amax(1),
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("case", ["plain", "capped", "scaled", "negative scale", "all"])
def test_oracle_of_records_and_metrics(case, soft, dtype):
    generator = seeded(5)
    options = CASES[case]
    for classes in CLASSES:
        # Half-integers: many are equal, to the target too, also after cap and scale.
        x = (torch.randn(40, classes, generator=generator) * 6).round().div(2).to(dtype)
        target = make_targets(soft, x, generator)
        for weight in (None, make_weight(x, generator)):
            e = expected_of(x, target, weight, options)
            linear = target.double() if soft else torch.ones_like(e.z)
            if weight is not None and not soft:
                linear = weight.double().expand_as(e.z)
            expected = expected_record(x, e, linear)
            if not soft:
                expected[:, 0] = torch.nan  # ignored
            for fused in (False, True):
                operator = OPS.cross_entropy_fused if fused else OPS.cross_entropy_forward
                *_, sums, records = operator(x, target, weight, *options.arguments(), 2)
                torch.testing.assert_close(records, expected, rtol=4e-6, atol=4e-6, equal_nan=True)
                torch.testing.assert_close(records[5], expected[5], equal_nan=True)  # exactly
            counted = expected[:, ~expected[0].isnan()]
            margin = counted[4] - counted[6] if classes > 1 else torch.zeros(1)
            entropy = counted[1].log() - counted[2] / counted[1]
            facts = {0: torch.ones_like(counted[0]), 1: (counted[5] == 0).double(), 3: entropy}
            facts |= {4: counted[0] + counted[1].log(), 5: 1 / counted[1]}
            facts |= {6: (counted[5] < 5).double(), 7: margin.double()}
            log_p = e.z - e.log_sum_exp[:, None]
            if soft:
                facts[2] = -(target.double() * log_p).sum(1)
            else:
                facts[2] = -log_p.gather(1, e.index[:, None])[1:, 0]
            for index, fact in facts.items():
                torch.testing.assert_close(sums[index], fact.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_oracle_of_cap_alone(dtype):
    """One class: the target's recorded logit is the capped one, and z-loss has the derivative."""
    y = torch.cat([torch.logspace(-30, 1.6, 4000, dtype=torch.float64), torch.tensor([0.0])])
    y = torch.cat([y, -y, torch.tensor([torch.inf, -torch.inf])]).to(dtype)
    options = Options(softcap=1.0, z_loss=0.5)
    target = torch.zeros(len(y), dtype=torch.int64)
    _, gradient, _, records = OPS.cross_entropy_fused(
        y[:, None], target, None, *options.arguments(), 2
    )
    tanh = y.double().tanh()
    eps = 2.0**-23 if dtype == torch.float32 else 2.0**-51
    torch.testing.assert_close(records[4], tanh, rtol=4 * eps, atol=2.0**-149)
    # d(z^2 / 2) / dy = z (1 - z^2)
    slope = 1 / y.double().clamp(-300, 300).cosh() ** 2
    torch.testing.assert_close(gradient[:, 0].double(), tanh * slope, rtol=16 * eps, atol=1e-44)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_of_a_slice_of_the_classes(dtype):
    """Two slices with the row sums of both give the gradient of the whole."""
    generator = seeded(3)
    x = logits_of_kind("normal", 9, 40, dtype, generator)
    target = make_targets(False, x, generator)
    options = Options(label_smoothing=0.1, z_loss=1e-2, softcap=8.0, total_classes=40)
    e = expected_of(x, target, None, options)
    _, row_max, row_sum, _, whole = OPS.cross_entropy_forward(
        x, target, None, *options.arguments(), 2
    )
    for begin, end in ((0, 23), (23, 40)):
        part, local = x[:, begin:end], target.where(target == -100, target - begin)
        arguments = options.arguments()
        *_, records = OPS.cross_entropy_forward(part, local, None, *arguments, 2)
        here = (local >= 0) & (local < end - begin)
        elsewhere = ~here & (target != -100)
        assert (records[4] == -torch.inf).equal(elsewhere)
        assert records[5].isnan().equal(~here)
        torch.testing.assert_close(records[4][here], whole[4][here])
        torch.testing.assert_close(
            records[6][elsewhere], records[0][elsewhere], rtol=0, atol=0
        )  # all are others
        gradient = OPS.cross_entropy_backward(
            torch.ones_like(row_max), part, local, None, row_max, row_sum, *arguments
        )
        assert_within_one_ulp(gradient, e.gradient[:, begin:end], e.gradient_error[:, begin:end])


def test_nan_logits_are_never_correct_and_have_no_rank():
    x = torch.zeros(2, 40)
    x[0, 7] = torch.nan
    target = torch.tensor([0, 0])
    _, _, sums, records = OPS.cross_entropy_fused(x, target, None, *Options().arguments(), 2)
    assert records[5, 0].isnan()
    assert records[5, 1] == 0
    assert sums[1] == 1
    assert sums[6] == 1
    assert sums[7].isnan()


def test_a_row_of_nothing_but_minus_infinity_has_no_probabilities():
    x = torch.full((1, 5), -torch.inf)
    _, _, sums, _ = OPS.cross_entropy_fused(x, torch.tensor([2]), None, *Options().arguments(), 2)
    assert sums[[2, 3, 5]].isnan().all()  # loss, entropy, top probability
    assert sums[8:].eq(0).all()  # and no bin of the calibration


@pytest.mark.parametrize("constant", [3.25, -1.75])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_capped_logit_is_at_no_distance(dtype, constant):
    x = torch.full((1, 15), constant, dtype=dtype)
    *_, records = OPS.cross_entropy_fused(
        x, torch.tensor([2]), None, *Options(softcap=30.0).arguments(), 2
    )
    assert records[1] == 15
    assert records[2] == 0


ODD_OPERANDS = {
    "at least one class": lambda x, t: (x[:, :0], x[:, :0], None, *Options().arguments(), 0),
    "of a slice": lambda x, t: (x, t, torch.ones(4), *Options(total_classes=9).arguments(), 0),
    "indices and no class weights": lambda x, t: (
        (x, x.softmax(1), None, *Options(total_classes=9).arguments(), 0)
    ),
}


@pytest.mark.parametrize("sentence", ODD_OPERANDS)
def test_operators_refuse_what_they_cannot_read(sentence):
    arguments = ODD_OPERANDS[sentence](torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=sentence):
        OPS.cross_entropy_forward(*arguments)


def test_backward_refuses_another_forwards_state():
    x, t = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    options = Options().arguments()
    _, row_max, row_sum, _, _ = OPS.cross_entropy_forward(x, t, None, *options, 0)
    strided = torch.zeros(6)[::2]
    with pytest.raises(RuntimeError, match="what cross_entropy_forward returned"):
        OPS.cross_entropy_backward(torch.ones(3), x, t, None, strided, row_sum, *options)
    with pytest.raises(RuntimeError, match="of 3 elements, got 2 dimensions"):
        OPS.cross_entropy_backward(torch.ones(1, 3), x, t, None, row_max, row_sum, *options)


def test_zero_probability_of_a_masked_class_costs_nothing():
    x = torch.zeros(1, 4)
    x[0, 3] = -torch.inf
    q = torch.tensor([[0.25, 0.25, 0.5, 0.0]])
    loss, gradient, _, _ = OPS.cross_entropy_fused(x, q, None, *Options().arguments(), 0)
    torch.testing.assert_close(loss, torch.tensor([3.0]).log())
    torch.testing.assert_close(gradient, torch.tensor([[1 / 12, 1 / 12, -1 / 6, 0.0]]))


def test_mean_is_divided_by_the_weights_of_the_targets():
    generator = seeded(2)
    x = logits_of_kind("normal", 9, 12, torch.float64, generator)
    target, weight = make_targets(False, x, generator), make_weight(x, generator)
    options = Options(reduction="mean", label_smoothing=0.1)
    loss, gradient, _, _ = OPS.cross_entropy_fused(x, target, weight, *options.arguments(), 0)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, target, weight, label_smoothing=0.1).backward()
    expected = torch.nn.functional.cross_entropy(x, target, weight, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, leaf.grad)


def test_threads_do_not_change_a_bit():
    generator = seeded(4)
    x = logits_of_kind("wide", 70, 3000, torch.bfloat16, generator)
    q = make_targets(True, x, generator)
    weight = make_weight(x, generator)
    arguments = (*CASES["all"].arguments()[:-1], "mean", 2)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OPS.cross_entropy_fused(x, q, weight, *arguments))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["recompute", "fused"])
@pytest.mark.parametrize("classes", [5, 47, 60, 1500])  # of columns, of one block, of several
def test_the_gradient_of_a_sure_target_is_exact(classes, mode, dtype) -> None:
    """p - 1 is what the others have together, 1e-6 to 1e-4 of the sum: torch loses up to all."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, classes, generator=generator)
    target = torch.randint(classes, (64,), generator=generator)
    rows = torch.arange(64)
    logits[rows, target] += 14
    logits = logits.to(dtype).requires_grad_()
    loss = pyvizllm.cross_entropy(logits, target, reduction="sum", fused=mode == "fused")
    loss.backward()
    exact = logits.detach().double()
    others = exact.clone()
    others[rows, target] = -torch.inf
    expected = -(others.logsumexp(1) - exact.logsumexp(1)).exp()
    bound = 8 * F32_EPS if dtype == torch.float32 else 2**-8
    error = (logits.grad[rows, target].double() - expected) / expected
    assert error.abs().max() <= bound
