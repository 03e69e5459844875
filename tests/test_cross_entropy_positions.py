"""cross_entropy where the classes are in the middle, [batch, classes, positions], as of images.

The operators against the formulas that rows are held to, and the function against rows that were
copied together. Positions: 1, 7 (less than a vector), 16 and 17 (a vector of float32, and one
more), 131 (more than two tiles of many classes, the last of 3).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, LOGIT_KINDS, assert_within_one_ulp, logits_of_kind, seeded
from test_cross_entropy_kernels import (
    CASES,
    Options,
    every_way,
    expected_of,
    expected_record,
    make_targets,
    make_weight,
)
from torch import Tensor

from pyvizllm.ops import cross_entropy

OPS = torch.ops.pyvizllm
BATCH = 2
POSITIONS = (1, 7, 16, 17, 131)
CLASSES = (1, 3, 21, 150)


def in_the_middle(rows: Tensor) -> Tensor:
    """[batch * positions, classes] as contiguous [batch, classes, positions]."""
    return rows.view(BATCH, -1, rows.shape[1]).transpose(1, 2).contiguous()


def as_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "smoothed", "z_loss"])
def test_oracle_of_losses_and_gradients(case, dtype, kind):
    generator = seeded(11)
    for classes in CLASSES:
        for positions in POSITIONS:
            x = logits_of_kind(kind, BATCH * positions, classes, dtype, generator)
            if kind == "masked" and case == "smoothed":
                x[x.isinf()] = -50.0  # the smoothed loss of a masked class is infinite
            target = make_targets(False, x, generator)
            for weight in (None, make_weight(x, generator)):
                expected = expected_of(x, target, weight, CASES[case])
                ways = every_way(in_the_middle(x), target, weight, CASES[case])
                for name, loss, gradient in ways:
                    assert gradient.dtype == dtype, name
                    assert gradient.shape == (BATCH, classes, positions), name
                    assert_within_one_ulp(loss, expected.loss, expected.loss_error)
                    assert_within_one_ulp(
                        as_rows(gradient), expected.gradient, expected.gradient_error
                    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["forward", "fused"])
def test_oracle_of_records_and_metrics(fused, dtype):
    """The records of positions by the formulas; the sums of metrics are those of rows."""
    generator = seeded(5)
    operator = OPS.cross_entropy_fused if fused else OPS.cross_entropy_forward
    for classes in CLASSES:
        for positions in POSITIONS:
            # Half-integers: many are equal, to the target too.
            x = torch.randn(BATCH * positions, classes, generator=generator) * 6
            x = x.round().div(2).to(dtype)
            target = make_targets(False, x, generator)
            for weight in (None, make_weight(x, generator)):
                arguments = (target, weight, *Options(label_smoothing=0.1).arguments(), 2)
                linear = torch.ones(x.shape, dtype=torch.float64)
                if weight is not None:
                    linear = weight.double().expand_as(linear)
                e = expected_of(x, target, weight, Options(label_smoothing=0.1))
                expected = expected_record(x, e, linear)
                expected[:, 0] = torch.nan  # ignored
                *_, sums, records = operator(in_the_middle(x), *arguments)
                torch.testing.assert_close(records, expected, rtol=4e-6, atol=4e-6, equal_nan=True)
                torch.testing.assert_close(records[5], expected[5], equal_nan=True)  # exactly
                *_, of_rows, _ = operator(x, *arguments)
                torch.testing.assert_close(sums, of_rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layouts_are_as_torchs(dtype, fused, reduction):
    """Contiguous, a window in the batch and the classes, channels last, and two transposed dims."""
    generator = seeded(3)
    base = torch.randn(4, 9, 6, 5, generator=generator, dtype=dtype)
    target = torch.randint(7, (2, 6, 5), generator=generator)
    target[0, 0] = -100
    weight = torch.rand(7, generator=generator, dtype=dtype)
    window = base[1:3, 1:8]
    layouts = {
        "contiguous": (window.contiguous(), target),
        "window": (window, target),
        "every second of the batch": (base[::2, :7], target),
        "channels last": (window.contiguous(memory_format=torch.channels_last), target),
        "transposed": (window.transpose(2, 3), target.transpose(1, 2)),
        "expanded": (window[:1].expand(2, 7, 6, 5), target),
    }
    for name, (logits, targets) in layouts.items():
        x = logits.detach().requires_grad_()
        options = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
        loss = cross_entropy(x, targets, fused=fused, **options)
        expected = F.cross_entropy(x, targets, **options)
        torch.testing.assert_close(loss, expected, msg=lambda m, name=name: f"{name}: {m}")
        upstream = torch.randn(loss.shape, generator=generator, dtype=dtype)
        (gradient,) = torch.autograd.grad(loss, x, upstream)
        (wanted,) = torch.autograd.grad(expected, x, upstream)
        torch.testing.assert_close(gradient, wanted, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("fused", [False, True])
def test_nan_and_inf_poison_their_position_alone(fused):
    x = torch.randn(1, 5, 40, generator=seeded(1))
    x[0, 2, 3], x[0, 0, 20], x[0, :, 39] = torch.nan, torch.inf, -torch.inf
    target = torch.randint(5, (1, 40), generator=seeded(2))
    target[0, 21], x[0, 1, 21] = -100, torch.nan  # ignored: no gradient, no loss
    x.requires_grad_()
    loss = cross_entropy(x, target, reduction="none", fused=fused)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 20, 39]] = True
    assert torch.equal(loss[0].isnan(), bad)
    assert torch.equal(gradient[0].isnan().all(0), bad)
    assert torch.equal(gradient[0].isnan().any(0), bad)
    assert (gradient[0, :, 21] == 0).all()


def test_threads_do_not_change_a_bit():
    generator = seeded(4)
    x = torch.randn(5, 19, 1000, generator=generator)
    target = torch.randint(19, (5, 1000), generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            loss, metrics = cross_entropy(leaf, target, return_metrics=True, label_smoothing=0.1)
            loss.backward()
            fused = OPS.cross_entropy_fused(x, target.view(-1), None, *Options().arguments(), 2)
            results.append((loss.detach(), metrics.sums, leaf.grad, *fused))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_metrics_and_tokens_have_the_targets_shape():
    generator = seeded(6)
    x = torch.randn(2, 6, 5, 4, generator=generator)
    target = torch.randint(6, (2, 5, 4), generator=generator)
    target[1, 2] = -100
    loss, metrics = cross_entropy(x, target, return_metrics="per_token")
    rows = x.permute(0, 2, 3, 1).reshape(-1, 6)
    expected, of_rows = cross_entropy(rows, target.view(-1), return_metrics="per_token")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics.sums, of_rows.sums)
    for name in ("loss", "entropy", "rank"):
        got = getattr(metrics.per_token, name)
        assert got.shape == target.shape
        expected_values = getattr(of_rows.per_token, name).view_as(target)
        torch.testing.assert_close(got, expected_values, equal_nan=True)


@pytest.mark.parametrize("wanted", [0, 2])
def test_operators_keep_torchs_contracts(wanted):
    generator = seeded(7)
    x = torch.randn(2, 5, 18, generator=generator, requires_grad=True)
    target = torch.randint(5, (36,), generator=generator)
    weight = torch.rand(5, generator=generator)
    for reduction in ("mean", "none"):
        options = Options(label_smoothing=0.1, z_loss=1e-3, reduction=reduction).arguments()
        arguments = (target, weight, *options)
        torch.library.opcheck(OPS.cross_entropy_forward.default, (x, *arguments, wanted))
        logits = x.detach()
        torch.library.opcheck(OPS.cross_entropy_fused.default, (logits, *arguments, wanted))
        in_place = (logits.clone(), *arguments, wanted)
        torch.library.opcheck(OPS.cross_entropy_fused_.default, in_place)
        loss, row_max, row_sum, *_ = OPS.cross_entropy_forward(logits, *arguments, wanted)
        backward = (loss, logits, target, weight, row_max, row_sum, *options)
        torch.library.opcheck(OPS.cross_entropy_backward.default, backward)


def test_second_derivative():
    x = torch.randn(2, 3, 16, generator=seeded(8), dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (2, 16), generator=seeded(9))
    weight = torch.rand(3, generator=seeded(10), dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: cross_entropy(x, target, weight, label_smoothing=0.1, reduction="sum"), (x,)
    )


ODD = {
    "no class": lambda x, t: (x[:, :0], t, None, *Options().arguments(), 0),
    "softcap": lambda x, t: (x, t, None, *Options(softcap=5.0).arguments(), 0),
    "logit_scale": lambda x, t: (x, t, None, *Options(logit_scale=2.0).arguments(), 0),
    "strided": lambda x, t: (x[..., ::2], t[::2], None, *Options().arguments(), 0),
}


@pytest.mark.parametrize("odd", ODD)
def test_operators_refuse_what_they_cannot_read(odd):
    arguments = ODD[odd](torch.zeros(2, 3, 4), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="with a class, positions next to each other"):
        OPS.cross_entropy_forward(*arguments)


def test_in_place_needs_contiguous_logits():
    x = torch.zeros(2, 3, 8)[:, :, :4]
    target = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="expected contiguous input"):
        OPS.cross_entropy_fused_(x, target, None, *Options().arguments(), 0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_images(reduction):
    x = torch.randn(0, 3, 16, requires_grad=True)
    loss = cross_entropy(x, torch.zeros(0, 16, dtype=torch.int64), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert gradient.shape == (0, 3, 16)
