"""AdamW against float64, fed the same gradients: no rounding error may be larger than torch's.

Sizes: 0 (empty, anywhere), 1, 15, 17 (around a vector), 1027 (a block and a bit), 65537 (a chunk,
and one more).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pyvizllm import AdamW

SIZES = ((0,), (1,), (15,), (17,), (13, 79), (65537,), (0, 3))
SMALL = tuple(size for size in SIZES if size != (65537,))  # for the tests of many steps
STEPS = 100


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(47)


def make_parameters(
    generator: torch.Generator, dtype: torch.dtype = torch.float32, sizes: tuple = SIZES
) -> list[Parameter]:
    return [Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def copies(parameters: list[Parameter], dtype: torch.dtype | None = None) -> list[Parameter]:
    return [Parameter(p.detach().clone().to(dtype or p.dtype)) for p in parameters]


def gradients_of(
    parameters: list[Parameter], generator: torch.Generator, missing: float = 0.0
) -> list[Tensor | None]:
    """Of scales that differ from tensor to tensor and from step to step; some may be missing."""
    grads: list[Tensor | None] = []
    for p in parameters:
        scale = 10 ** float(torch.empty(()).uniform_(-3, 0, generator=generator))
        grad = torch.randn(p.shape, generator=generator) * scale
        lost = float(torch.rand((), generator=generator)) < missing
        grads.append(None if lost else grad.to(p.dtype))
    return grads


def set_gradients(parameters: list[Parameter], grads: list[Tensor | None]) -> None:
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = None if grad is None else grad.clone().to(p.dtype)


def run(
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    steps: int,
    missing: float = 0.0,
) -> None:
    """Steps on the same gradients."""
    lists = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    for _ in range(steps):
        grads = gradients_of(lists[0], generator, missing)
        for optimizer, parameters in zip(optimizers, lists, strict=True):
            set_gradients(parameters, grads)
            optimizer.step()


def errors(parameters: list[Parameter], reference: list[Parameter]) -> Tensor:
    return torch.cat(
        [(p.double() - r).abs().flatten() for p, r in zip(parameters, reference, strict=True)]
    ).detach()


def assert_equal(first: list[Parameter], second: list[Parameter]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def random_options(generator: torch.Generator) -> dict[str, Any]:
    def uniform(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high, generator=generator))

    def choice(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    lr = 10 ** uniform(-4, -2)
    return {
        "lr": torch.tensor(lr) if choice(True, False) else lr,
        "betas": (choice(0.0, 0.3, 0.5, 0.9, 0.95), choice(0.0, 0.5, 0.95, 0.999, 0.9999)),
        "eps": 10 ** uniform(-9, -5),
        "weight_decay": choice(0.0, 1e-2, 0.1, 0.5),
        "amsgrad": choice(True, False),
        "maximize": choice(True, False),
    }


def check_against_torch(seed: int, dtype: torch.dtype) -> None:
    """Random options, gradient scales, skipped steps and missing gradients, over 100 steps."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    ours = make_parameters(generator, dtype, SMALL)
    theirs, exact = copies(ours), copies(ours, torch.float64)
    options = random_options(generator)
    if dtype == torch.float16:
        options["eps"] = 1e-4  # the squares of small gradients are 0 in float16, for both
    optimizer = AdamW(ours, **options)
    fused = torch.optim.AdamW(theirs, **options, fused=True)
    # As a float: torch would form 1 - lr * weight_decay in the tensor's float32.
    reference = torch.optim.AdamW(exact, **{**options, "lr": float(options["lr"])})
    for _ in range(STEPS):
        grads = gradients_of(ours, generator, missing=0.1)
        scaled = bool(torch.randint(2, (), generator=generator))
        skipped = bool(torch.rand((), generator=generator) < 0.1)
        for o in (optimizer, fused):
            o.grad_scale = torch.tensor(128.0) if scaled else None
            o.found_inf = torch.tensor(1.0 if skipped else 0.0)
        factor = 128.0 if scaled else 1.0
        set_gradients(ours, [None if g is None else g * factor for g in grads])
        set_gradients(theirs, [None if g is None else g * factor for g in grads])
        set_gradients(exact, grads)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        fused.step()
        if not skipped:
            reference.step()
        else:
            for p, old in zip(ours, before, strict=True):
                assert torch.equal(p, old)
    error, torchs = errors(ours, exact), errors(theirs, exact)
    assert torch.isfinite(error).all()
    # Where the stored numbers' rounding is all there is, both have it, and differ by chance.
    assert error.mean() <= 1.02 * torchs.mean()
    for p, q in zip(ours, theirs, strict=True):
        if p in optimizer.state:
            assert torch.equal(optimizer.state[p]["step"], fused.state[q]["step"])


@pytest.mark.parametrize("seed", range(12))
def test_oracle_float32_error_is_no_larger_than_torchs(seed):
    check_against_torch(seed, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(100, 104))
def test_oracle_low_precision_error_is_no_larger_than_torchs(seed, dtype):
    check_against_torch(seed, dtype)


def test_oracle_float64_agrees_with_torchs(generator):
    for seed in range(4):
        device = torch.get_default_device()
        options = random_options(torch.Generator(device).manual_seed(seed))
        options["lr"] = float(options["lr"])
        ours = make_parameters(generator, torch.float64, SMALL)
        theirs = copies(ours)
        run([AdamW(ours, **options), torch.optim.AdamW(theirs, **options)], generator, STEPS)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta2", [0.999, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_oracle_infinite_and_nan_second_moments_are_torchs(dtype, beta2):
    """An infinite one stops its element and does not become NaN: float16's overflow at 65504."""
    ours = [Parameter(torch.full((19,), 2.0, dtype=dtype))]
    theirs = copies(ours)
    optimizers = [
        AdamW(ours, lr=0.1, betas=(0.9, beta2)),
        torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, beta2), fused=True),
    ]
    for step in range(4):
        grad = torch.full((19,), 0.5)
        if step == 1:
            grad[3] = torch.inf
        for (p,), optimizer in zip((ours, theirs), optimizers, strict=True):
            if step == 1:
                optimizer.state[p]["exp_avg_sq"][torch.tensor([0, 17])] = torch.inf
                optimizer.state[p]["exp_avg_sq"][torch.tensor([1, 18])] = torch.nan
            set_gradients([p], [grad])
            optimizer.step()
    got, expected = (o.state[p[0]] for o, p in zip(optimizers, (ours, theirs), strict=True))
    moments = [state["exp_avg_sq"] for state in (got, expected)]
    assert moments[0].isinf().nonzero().flatten().tolist() == [0, 3, 17]
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(*moments, **close)
    torch.testing.assert_close(ours[0], theirs[0], **close)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_meets_the_oracle(capability):
    """The kernels of the lesser instruction sets, in a process that is told to use them."""
    folder = os.path.dirname(__file__)
    files = [os.path.join(folder, name) for name in ("test_optim.py", "test_optim_collect.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "oracle and not instruction_set", *files],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_same_bits_for_any_number_of_threads(generator):
    results = []
    threads = torch.get_num_threads()
    initial = make_parameters(generator, sizes=((300_001,), (5,), (70_000,)))
    seed = generator.get_state()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            generator.set_state(seed)
            parameters = copies(initial)
            optimizer = AdamW(parameters, max_grad_norm=1.0)
            optimizer.collect(grad=True)
            run([optimizer], generator, 3)
            collected = optimizer.collected
            statistics = [collected.grad, collected.update, collected.param]
            tensors = [t for s in statistics for t in (s.values, s.counts, s.histogram)]
            results.append([*parameters, *tensors])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_equal(results[0], other)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "padded": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "contiguous"])
def test_any_layout_gives_the_same_bits(param_layout, grad_layout, generator):
    """31 x 67: odd, so that rows start at any address."""
    start = torch.randn(31, 67, generator=generator)
    plain, other = Parameter(start.clone()), Parameter(LAYOUTS[param_layout](start))
    assert not other.is_contiguous()
    optimizers = [AdamW([p], lr=0.1, amsgrad=True) for p in (plain, other)]
    storage = other.untyped_storage().data_ptr()
    for optimizer in optimizers:
        optimizer.collect()
    for _ in range(3):
        plain.grad = torch.randn(31, 67, generator=generator)
        other.grad = LAYOUTS.get(grad_layout, torch.clone)(plain.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, other)
    assert other.untyped_storage().data_ptr() == storage
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        first, second = optimizers[0].state[plain][name], optimizers[1].state[other][name]
        assert torch.equal(first, second)
    first, second = (optimizer.collected for optimizer in optimizers)
    assert torch.equal(first.update.histogram, second.update.histogram)
    assert torch.equal(first.param.counts, second.param.counts)


def test_an_expanded_gradient(generator):
    (first,) = make_parameters(generator, sizes=((5000,),))
    (second,) = copies([first])
    first.grad = torch.full((5000,), 0.25)
    second.grad = torch.tensor(0.25).expand(5000)
    for p in (first, second):
        AdamW([p]).step()
    assert torch.equal(first, second)


def test_dtypes_and_options_differ_from_group_to_group(generator):
    """The moments of each group are as they would be alone."""
    groups = [make_parameters(generator, dtype) for dtype in (torch.float32, torch.bfloat16)]
    mixed = groups[0] + groups[1]
    apart = copies(mixed)
    together = AdamW(
        [
            {"params": mixed[::2], "lr": 1e-2, "weight_decay": 0.0},
            {"params": mixed[1::2], "betas": (0.8, 0.9), "amsgrad": True},
        ]
    )
    alone = [
        *(AdamW([p], lr=1e-2, weight_decay=0.0) for p in apart[::2]),
        *(AdamW([p], betas=(0.8, 0.9), amsgrad=True) for p in apart[1::2]),
    ]
    for _ in range(5):
        grads = gradients_of(mixed, generator, missing=0.2)
        set_gradients(mixed, grads)
        set_gradients(apart, grads)
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert_equal(mixed, apart)


def test_a_parameter_listed_twice_is_refused():
    """Two threads would step it at the same time."""
    param = torch.nn.Parameter(torch.ones(3))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="expected each parameter once"),
    ):
        AdamW([param, param])
    optimizer = AdamW([param])
    other = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="once"):
        optimizer.add_param_group({"params": [other, other]})
    assert len(optimizer.param_groups) == 1


def test_two_parameters_over_one_memory_are_refused():
    weight = torch.ones(5)
    parameters = [Parameter(weight), Parameter(weight)]
    for parameter in parameters:
        parameter.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match="each parameter in memory of its own"):
        AdamW(parameters).step()
    assert torch.equal(weight, torch.ones(5))
    empty = [Parameter(torch.ones(0)), Parameter(torch.ones(0))]  # share the null pointer
    for parameter in empty:
        parameter.grad = torch.ones(0)
    AdamW(empty).step()


def test_moments_of_another_shape_are_refused():
    parameter = Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    optimizer = AdamW([parameter])
    optimizer.step()
    parameter.data = torch.ones(3, 2)
    parameter.grad = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="exp_avg of the parameter's shape at position 0"):
        optimizer.step()
