"""The operators of cross_entropy against the formulas composed in float64 from the same inputs.

Called below `pyvizllm.ops`, so that all options meet all dtypes, kinds of rows and instruction
sets. Classes: 1 (no other class), 10 (less than a vector), 17 (a vector and one more), 2049 (a block
and one more).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracle import DTYPES, F32_EPS, LOGIT_KINDS, assert_within_one_ulp, logits_of_kind
from torch import Tensor

import pyvizllm.ops  # noqa: F401  registers the operators

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
    generator = torch.Generator().manual_seed(11)
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
