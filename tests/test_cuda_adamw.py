"""The CUDA AdamW kernel, run on the CPU (tests/cuda_on_cpu), against AdamW in plain float64.

Sizes: 0 (also last), 1, 3, 5 (around a vector of 4), 1023 and 1031 (a step of the block, 1024, and
a ragged end), 32767..32769 (a chunk), 70001 (three chunks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, Kernels
from oracle import ulp
from torch import Tensor

from pyvizllm.ops import BINS, tensor_stats

SIZES = (0, 1, 3, 5, 1023, 1031, 32767, 32768, 32769, 70001, 0)
OPTIONS = {"lr": 2e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Parameters, gradients, moments: all that the kernel takes.
DTYPES = (
    *((F32, F32, F32), (F64, F64, F64)),
    *((low, *others) for low in (F16, BF16) for others in ((low, low), (low, F32), (F32, F32))),
)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(37)


@dataclass
class Problem:
    """Parameters and what belongs to them, as the operator's first arguments."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    options: dict[str, float] = field(default_factory=lambda: dict(OPTIONS))
    maximize: bool = False

    def lists(self) -> list[list[Tensor]]:
        moments = [self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs]
        return [self.params, self.grads, *moments, self.masters, self.steps]

    def copy(self) -> Problem:
        lists = [[t.clone() for t in tensors] for tensors in self.lists()]
        return Problem(*lists, dict(self.options), self.maximize)

    def step(self, kernels: Kernels, **arguments: object) -> tuple[Tensor, ...]:
        names = ("grad_scale", "found_inf", "clip_coefficient", "statistics")
        rest = [arguments.get(name) for name in (*names, "update_histogram", "param_histogram")]
        rest[3] = bool(rest[3])
        numbers = (*self.options.values(), self.maximize)
        return kernels.adamw_(*self.lists(), arguments.get("lr_tensor"), *numbers, *rest)


def problem(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    generator: torch.Generator,
    sizes: tuple[int, ...] = SIZES,
    amsgrad: bool = False,
    masters: bool = False,
    place: Callable[[Tensor], Tensor] = torch.clone,
) -> Problem:
    """Steps taken differ from tensor to tensor; moments are those of such gradients."""
    param, grad, state = dtypes

    def values(dtype: torch.dtype, scale: float, square: bool = False) -> list[Tensor]:
        x = [torch.randn(n, generator=generator, dtype=F64) * scale for n in sizes]
        return [place((t * t if square else t).to(dtype)) for t in x]

    wide = values(F32, 1.0)
    return Problem(
        [place(t.to(param)) for t in wide] if masters else values(param, 1.0),
        values(grad, 0.1),
        values(state, 0.05),
        values(state, 0.1, square=True),
        values(state, 0.1, square=True) if amsgrad else [],
        wide if masters else [],
        [torch.tensor(float(3 * t % 7)) for t in range(len(sizes))],
    )


def check(
    before: Problem,
    after: Problem,
    factor: float = 1.0,  # of the gradients
    lr: float | None = None,
) -> None:
    """All results within one unit in the last place and some roundings of the arithmetic's own."""
    o = before.options
    lr = o["lr"] if lr is None else lr
    for t, param in enumerate(before.params):
        # Of the accumulation type: on a handful of operations, relative to the terms they add.
        eps = 2.0**-53 if param.dtype == F64 else 2.0**-24

        def close(got: Tensor, expected: Tensor, terms: Tensor, eps: float = eps) -> None:
            allowed = 6 * eps * terms + ulp(expected.abs(), got.dtype)
            if got.dtype == F64:  # in which the oracle rounds too
                allowed += 6 * eps * expected.abs()
            assert ((got.double() - expected).abs() <= allowed).all()

        step = before.steps[t].double() + 1
        assert after.steps[t] == step
        g = before.grads[t].double() * factor * (-1 if before.maximize else 1)
        m = o["beta1"] * before.exp_avgs[t].double() + (1 - o["beta1"]) * g
        v = o["beta2"] * before.exp_avg_sqs[t].double() + (1 - o["beta2"]) * g * g
        close(after.exp_avgs[t], m, before.exp_avgs[t].double().abs() + g.abs())
        close(after.exp_avg_sqs[t], v, v)
        if before.max_exp_avg_sqs:
            v = torch.maximum(before.max_exp_avg_sqs[t].double(), v)
            close(after.max_exp_avg_sqs[t], v, v)
        old = (before.masters or before.params)[t].double()
        size = lr / (1 - o["beta1"] ** step)
        change = size * m / ((v / (1 - o["beta2"] ** step)).sqrt() + o["eps"])
        new = old - lr * o["weight_decay"] * old - change
        terms = (
            size
            * (before.exp_avgs[t].double().abs() + g.abs())
            / ((v / (1 - o["beta2"] ** step)).sqrt() + o["eps"])
        )
        close(after.params[t], new, terms)
        if before.masters:
            close(after.masters[t], new, terms)
            assert torch.equal(after.params[t], after.masters[t].to(param.dtype))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_oracle(dtypes, kernels, generator):
    kernels.schedule("forward")
    variants = [{}, {"amsgrad": True}]
    if dtypes[0] in (F16, BF16):
        variants.append({"amsgrad": True, "masters": True})
    for variant in variants:
        before = problem(dtypes, generator, **variant)
        after = before.copy()
        after.step(kernels)
        check(before, after)


def test_oracle_of_options_on_the_device(kernels, generator):
    kernels.schedule("shuffled")
    for number, lr_dtype in enumerate((F32, F64)):
        before = problem((F32, F32, F32), generator)
        before.maximize = number == 0
        before.options["weight_decay"] = 0.0 if number == 0 else 0.01
        lr, scale, clip = torch.tensor(3e-4, dtype=lr_dtype), torch.tensor(1024.0), 0.37
        for gradient in before.grads:
            gradient *= scale
        after = before.copy()
        after.options["lr"] = math.nan  # not read
        after.step(
            kernels,
            lr_tensor=lr,
            grad_scale=scale,
            found_inf=torch.zeros(()),
            clip_coefficient=torch.tensor(clip, dtype=F64),
        )
        check(before, after, factor=clip / 1024, lr=float(lr))


def test_found_inf_skips_the_step(kernels, generator):
    before = problem((BF16, BF16, F32), generator, amsgrad=True, masters=True)
    after = before.copy()
    histograms = torch.ones(2, len(SIZES), BINS, dtype=torch.int64)
    results = after.step(
        kernels,
        found_inf=torch.ones(()),
        statistics=True,
        update_histogram=histograms[0],
        param_histogram=histograms[1],
    )
    for first, second in zip(before.lists(), after.lists(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (histograms == 1).all()
    nothing = tensor_stats([torch.empty(0)] * len(SIZES))
    for got in (results[:2], results[2:]):
        assert torch.equal(got[0], nothing.values)
        assert torch.equal(got[1], nothing.counts)


def check_statistics(results: tuple[Tensor, Tensor], histogram: Tensor, x: list[Tensor]) -> None:
    wanted = tensor_stats(x)
    values, counts = results
    assert torch.equal(histogram - 1, wanted.histogram)
    assert torch.equal(counts, wanted.counts)
    torch.testing.assert_close(values[4:], wanted.values[4:], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values[1:4], wanted.values[1:4], rtol=4e-6, atol=0, equal_nan=True)
    for got, total, abs_sum in zip(values[0], wanted.sum, wanted.abs_sum, strict=True):
        atol = 4e-6 * float(abs_sum.nan_to_num(0, 0, 0))
        torch.testing.assert_close(got, total, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_statistics_and_histograms(dtypes, broken, kernels, generator):
    """Of the new parameter, and of the difference to the old one: as stored, or of masters."""
    low = dtypes[0] in (F16, BF16)
    before = problem(dtypes, generator, masters=low)
    if broken:  # zeros, infinities and NaNs; updates below float32's squares
        before.options["lr"] = 1e-26
        for gradient in before.grads:
            gradient[::3] = 0
            gradient[7::31] = math.inf
            gradient[5::37] = math.nan
        for param in before.params + before.masters:
            param[::5] = 0
            param[3::41] = -math.inf
    outcomes = []
    for order in ORDERS:
        kernels.schedule(order, 3)
        after = before.copy()
        histograms = torch.ones(2, len(SIZES), BINS, dtype=torch.int64)
        results = after.step(
            kernels,
            statistics=True,
            update_histogram=histograms[0],
            param_histogram=histograms[1],
        )
        outcomes.append((*results, histograms, *(t for x in after.lists() for t in x)))
    for first, second in zip(*outcomes, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    wide = F64 if dtypes[0] == F64 else F32
    update = [
        new.to(wide) - old.to(wide)
        for new, old in zip(
            after.masters or after.params, before.masters or before.params, strict=True
        )
    ]
    check_statistics(results[:2], histograms[0], update)
    check_statistics(results[2:], histograms[1], after.params)


@pytest.mark.parametrize("wanted", ["values", "update", "param"])
def test_any_part_may_be_left_out(wanted, kernels, generator):
    kernels.schedule("forward")
    before = problem((F32, F32, F32), generator)
    whole, part, plain = before.copy(), before.copy(), before.copy()
    histograms = torch.zeros(2, len(SIZES), BINS, dtype=torch.int64)
    alone = torch.zeros(len(SIZES), BINS, dtype=torch.int64)
    results = whole.step(
        kernels, statistics=True, update_histogram=histograms[0], param_histogram=histograms[1]
    )
    if wanted == "values":
        for got, expected in zip(part.step(kernels, statistics=True), results, strict=True):
            assert torch.equal(got, expected)
    else:
        part.step(kernels, **{f"{wanted}_histogram": alone})
        assert torch.equal(alone, histograms[0 if wanted == "update" else 1])
    plain.step(kernels)
    for other in (part, plain):
        for first, second in zip(whole.lists(), other.lists(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_alignment(kernels, generator):
    """Arrays that start at the same odd address are read in vectors from where those begin; arrays
    of different alignments one by one. Sentinels around each stay."""
    kernels.schedule("forward")
    sentinel = -12.5

    for same in (True, False):
        for start in range(1, 9):
            buffers: list[Tensor] = []

            def place(values: Tensor, start: int = start, same: bool = same) -> Tensor:
                shift = start if same else start + len(buffers) % 3  # noqa: B023
                buffer = torch.full((len(values) + 16,), sentinel, dtype=values.dtype)
                view = buffer[shift : shift + len(values)]
                view.copy_(values)
                buffers.append(buffer)  # noqa: B023
                return view

            dtypes = DTYPES[start % len(DTYPES)]
            sizes = (1, 7, 2100)
            after = problem(dtypes, generator, sizes, amsgrad=True, place=place)
            before = after.copy()
            outside = [(b == sentinel).sum() for b in buffers]
            after.step(kernels, statistics=True)
            check(before, after)
            assert [(b == sentinel).sum() for b in buffers] == outside


def test_more_tensors_than_one_table_holds(kernels, generator):
    """903 tensors of two dtypes in turn, empties in between; tables of 440 of one dtype."""
    kernels.schedule("shuffled", 2)
    sizes = tuple(t % 5 for t in range(903))
    before = problem((F32, F32, F32), generator, sizes)
    for t in range(0, 903, 7):
        for tensors in before.lists():
            if tensors and tensors is not before.steps:
                tensors[t] = tensors[t].bfloat16()
    after = before.copy()
    histogram = torch.ones(len(sizes), BINS, dtype=torch.int64)
    results = after.step(kernels, statistics=True, param_histogram=histogram)
    check(before, after)
    check_statistics(results[2:], histogram, after.params)


def test_an_infinite_second_moment_stops_its_element_as_in_torch(kernels):
    """And does not make it NaN: float16 moments overflow at 65504."""
    param, moment = torch.tensor([2.0, 3.0]).half(), torch.tensor([math.inf, 1.0]).half()
    p = Problem([param], [torch.ones(2).half()], [torch.zeros(2).half()], [moment], [], [], [])
    p.steps.append(torch.zeros(()))
    p.options |= {"lr": 0.5, "weight_decay": 0.0}
    p.step(kernels)
    assert p.params[0][0] == 2
    assert p.exp_avg_sqs[0][0] == math.inf
    assert p.params[0].isfinite().all()
    assert p.params[0][1] < 3


def test_hundred_steps_are_as_near_to_float64_as_torchs(kernels, generator):
    start = torch.randn(5000, generator=generator, dtype=F64)
    gradients = torch.randn(100, 5000, generator=generator, dtype=F64) * 0.1
    finals = {}
    for name, dtype in (("exact", F64), ("torch", F32)):
        param = torch.nn.Parameter(start.to(F32).to(dtype))
        optimizer = torch.optim.AdamW([param], lr=2e-3, weight_decay=0.1, fused=dtype == F32)
        for gradient in gradients:
            param.grad = gradient.to(F32).to(dtype)
            optimizer.step()
        finals[name] = param.detach().double()
    kernels.schedule("forward")
    zeros = [torch.zeros(5000) for _ in range(2)]
    ours = Problem([start.to(F32)], [], [zeros[0]], [zeros[1]], [], [], [torch.zeros(())])
    for gradient in gradients:
        ours.grads = [gradient.to(F32)]
        ours.step(kernels)
    error = {
        "torch": (finals["torch"] - finals["exact"]).abs().mean(),
        "ours": (ours.params[0].double() - finals["exact"]).abs().mean(),
    }
    assert error["ours"] <= error["torch"]
