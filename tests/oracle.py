"""The float64 reference that the operations are held to, and the tolerance it implies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

F32_EPS = 2.0**-24  # half a unit in the last place of float32, relative
# Significand bits, and the exponent of the least normal number.
PRECISION = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
}
DTYPES = tuple(PRECISION)


def seeded(seed: int) -> torch.Generator:
    """Of the default device, which is the GPU's in the tests of test_gpu.py."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each float64 value."""
    bits, least = PRECISION[dtype]
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.ones_like(value), (exponent - 1).clamp(min=least) - bits + 1)


@dataclass
class CrossEntropyOracle:
    """Loss per row, gradient and metrics in float64, from the low-precision logits themselves."""

    loss: Tensor  # [rows]
    gradient: Tensor  # [rows, classes], for `upstream`
    internal: Tensor  # [rows, classes]: what float32 internals may add to the gradient's error
    entropy: Tensor  # [rows]
    probability: Tensor  # [rows, classes]
    log_sum_exp: Tensor  # [rows]


def cross_entropy_oracle(
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # [rows]
    upstream: Tensor,  # [rows] or []
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "none",
) -> CrossEntropyOracle:
    x = logits.detach().double()
    classes = x.shape[1]
    counts = target != ignore_index
    index = target.long().where(counts, 0)
    distance = x - x.amax(1, keepdim=True)
    log_sum = distance.exp().sum(1, keepdim=True).log()
    log_p = distance - log_sum
    p = log_p.exp()
    lse = (x.amax(1, keepdim=True) + log_sum).squeeze(1)
    nll = -log_p.gather(1, index[:, None]).squeeze(1)
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(1) * (label_smoothing > 0)
    if label_smoothing == 0:
        loss = nll
    loss = loss + z_loss * lse**2

    grad = p * (1 + 2 * z_loss * lse[:, None]) - label_smoothing / classes
    # p - 1 of the target without cancellation.
    at_target = torch.expm1(log_p.gather(1, index[:, None])) + label_smoothing
    at_target += 2 * z_loss * lse[:, None] * p.gather(1, index[:, None]) - label_smoothing / classes
    grad = grad.scatter(1, index[:, None], at_target)
    scale = upstream.double().expand(len(x)).clone()
    if reduction == "mean":
        scale = scale / counts.sum()
    scale = torch.where(counts, scale, 0.0)[:, None]
    # Rounding the logit's distance to the maximum, d, puts d * eps into exp(d); exp itself, the
    # sum, the scale and the product add a few eps. A term below 2^-126 loses relative precision.
    terms = p * (1 + (2 * z_loss * lse[:, None]).abs()) + label_smoothing / classes
    relative = F32_EPS * (distance.clamp(min=-105).abs() + 8)
    # The sum of float32 lanes may drop what is 2^-24 of it: it shows where p - 1 cancels.
    internal = scale.abs() * (terms * relative + 2 * F32_EPS * (grad.abs() > 0) + 2.0**-148)
    internal_relative = scale.abs() * terms * relative
    is_target = torch.zeros_like(p, dtype=torch.bool).scatter(1, index[:, None], True)
    internal = torch.where(is_target, internal, internal_relative + scale.abs() * 2.0**-148)
    entropy = -(p * log_p.clamp(min=-1e30)).sum(1)
    return CrossEntropyOracle(
        torch.where(counts, loss, 0.0), grad * scale, internal, entropy, p, lse
    )


@dataclass
class MetricsOracle:
    """What the metrics are sums of, each [rows] float64, of all rows: the caller picks."""

    index: Tensor  # int64: the target, or the most probable one
    loss: Tensor
    entropy: Tensor
    log_sum_exp: Tensor
    top_probability: Tensor
    rank: Tensor  # int64
    margin: Tensor

    def sums(self, counts: Tensor) -> Tensor:
        """[53]: packed as CrossEntropyMetrics.sums, over the rows that count."""
        one, correct = torch.ones_like(self.loss), (self.rank == 0).double()
        values = (
            one,
            correct,
            self.loss,
            self.entropy,
            self.log_sum_exp,
            self.top_probability,
            (self.rank < 5).double(),
            self.margin,
        )
        bins = torch.zeros(3, 15, dtype=torch.float64)
        index = (self.top_probability[counts] * 15).ceil().long() - 1
        for row, value in enumerate((one, correct, self.top_probability)):
            bins[row].index_add_(0, index, value[counts])
        return torch.cat([torch.stack([v[counts].sum() for v in values]), bins.view(-1)])


def metrics_oracle(
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # [rows], or probabilities [rows, classes]
    *,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> MetricsOracle:
    z = logits.detach().double() * logit_scale
    if softcap:
        z = softcap * (z / softcap).tanh()
    rows, classes = z.shape
    log_p = z.log_softmax(1)
    p = log_p.exp()
    if target.dim() == 2:
        index = target.argmax(1)
        loss = -(target.double() * log_p.clamp(min=-1e30)).sum(1)
    else:
        index = target.long().clamp(min=0)
        loss = -log_p[torch.arange(rows), index]
    rank, margin = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
    for row in range(rows):  # by sorting, which is stable: equal logits in the order of classes
        order = z[row].argsort(descending=True, stable=True).tolist()
        rank[row] = order.index(index[row])
        if classes > 1:
            margin[row] = z[row, index[row]] - z[row, order[1 if rank[row] == 0 else 0]]
    entropy = -(p * log_p.clamp(min=-1e30)).sum(1)
    return MetricsOracle(index, loss, entropy, z.logsumexp(1), p.amax(1), rank, margin)


def assert_within_one_ulp(got: Tensor, expected: Tensor, internal: Tensor) -> None:
    """One rounding to got's dtype on top of what the float32 internals allow."""
    error = (got.double() - expected).abs()
    if got.dtype == torch.float64:
        internal = internal * 2.0**-26
    allowed = internal + ulp(expected.abs() + internal, got.dtype)
    worst = (error / allowed).max() if error.numel() else torch.zeros(())
    assert not torch.isnan(error).any(), "NaN where a number was expected"
    assert worst <= 1, f"{worst.item():.2f} times the allowed error"


def logits_of_kind(
    kind: str, rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    x = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    if kind == "peaked":
        x[torch.arange(rows), torch.randint(classes, (rows,), generator=generator)] += 30
    elif kind == "wide":
        x *= 20
    elif kind == "shifted":
        x += 1e4
    elif kind == "masked":
        x[torch.rand(x.shape, generator=generator) < 0.5] = -torch.inf
        x[:, 0] = 0.5
    elif kind == "constant":
        x[:] = 3.25
    else:
        assert kind == "normal"
    return x.to(dtype)


LOGIT_KINDS = ("normal", "peaked", "wide", "shifted", "masked", "constant")
