"""clip_grad_norm_ against torch's own on the same gradients.

Sizes: 0, 1, 15..17 (around a vector), 1025 (a block and one), 65537 (a chunk and one).
"""

from __future__ import annotations

import mmap

import pytest
import torch
from test_tensor_stats import check
from torch import Tensor, nn

from pyvizllm import clip_grad_norm_
from pyvizllm.ops import BINS

SIZES = (0, 1, 15, 16, 17, 1025, 65537)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Torch rounds each gradient's norm to its dtype; ours adds float64 one after the other, 65536 long.
EPS = {dtype: max(4 * torch.finfo(dtype).eps, 1e-12) for dtype in DTYPES}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(41)


def parameters_of(gradients: list[Tensor | None]) -> list[Tensor]:
    parameters = []
    for gradient in gradients:
        like = torch.zeros(3) if gradient is None else gradient.detach()
        parameter = nn.Parameter(torch.zeros_like(like))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def clones(gradients: list[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else g.clone() for g in gradients]


def assert_as_torch(gradients: list[Tensor | None], max_norm: float, *options: object) -> None:
    wanted = parameters_of(clones(gradients))
    got = parameters_of(clones(gradients))
    wanted_norm = nn.utils.clip_grad_norm_(wanted, max_norm, *options)
    norm = clip_grad_norm_(got, max_norm, *options)
    assert (norm.dtype, norm.device, norm.shape) == (
        wanted_norm.dtype,
        wanted_norm.device,
        wanted_norm.shape,
    )
    precision = max(EPS[g.dtype] for g in gradients if g is not None)
    torch.testing.assert_close(norm, wanted_norm, rtol=precision, atol=0, equal_nan=True)
    for ours, theirs in zip(got, wanted, strict=True):
        if theirs.grad is None:
            assert ours.grad is None
            continue
        tolerance = 2 * precision
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=tolerance, atol=1e-7, equal_nan=True
        )
        assert ours.grad.stride() == theirs.grad.stride()


@pytest.mark.parametrize("norm_type", [2.0, 0, 1, 1.5, 3, "inf", float("inf")])
@pytest.mark.parametrize("max_norm", [0.3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_torch(dtype, max_norm, norm_type, generator):
    sizes = SIZES[1:] if norm_type in ("inf", float("inf")) else SIZES
    gradients = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    assert_as_torch([None, *gradients, None], max_norm, norm_type)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_mixed_dtypes_and_layouts(foreach, generator):
    base = torch.randn(64, 48, generator=generator)
    gradients = [
        base.t(),
        base[:, 3:40].bfloat16(),
        base[1:, 1:].flatten()[1:].double(),
        torch.randn(4, 5, 6, generator=generator).permute(2, 0, 1).half(),
        torch.tensor(3.0),
    ]
    assert_as_torch(gradients, 0.7, 2.0, False, foreach)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negated_gradients(dtype, generator):
    """As autograd leaves them behind a conj(): the sign is in the tensor, not in its memory."""
    values = torch.randn(64, generator=generator).to(dtype)
    negated, plain = (nn.Parameter(torch.zeros_like(values)) for _ in range(2))
    negated.grad, plain.grad = torch._neg_view(-values), values.clone()
    assert negated.grad.is_neg()
    norms = [clip_grad_norm_(p, 0.5) for p in (negated, plain)]
    assert torch.equal(*norms)
    torch.testing.assert_close(negated.grad, plain.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coefficient_dtype", [torch.float32, torch.float64], ids=str)
def test_the_product_has_the_bits_of_torchs(dtype, coefficient_dtype, generator):
    coefficient = torch.tensor(0.3377, dtype=torch.float64).to(coefficient_dtype)
    gradients = [torch.randn(n, generator=generator).to(dtype) for n in SIZES]
    gradients[-1][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    wanted = [gradient.cpu().clone() for gradient in gradients]
    torch._foreach_mul_(wanted, coefficient.cpu())  # on CUDA torch rounds the coefficient first
    torch.ops.pyvizllm.scale_(gradients, coefficient.double())
    for got, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_zeros_stay_negative(dtype):
    gradients = [torch.full((n,), -0.0, dtype=dtype) for n in (1, 3, 17, 33)]
    torch.ops.pyvizllm.scale_(gradients, torch.tensor(0.5, dtype=torch.float64))
    assert all(gradient.signbit().all() for gradient in gradients)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm_type", [2.0, "inf"])
def test_nonfinite_norms_poison_as_in_torch_or_raise(norm_type, value, generator):
    gradients = [torch.randn(n, generator=generator) for n in (5, 70_000)]
    gradients[1][66_000] = value
    assert_as_torch(gradients, 1.0, norm_type)
    before = clones(gradients)
    with pytest.raises(RuntimeError, match=r"total norm of order .* is non-finite"):
        clip_grad_norm_(parameters_of(gradients), 1.0, norm_type, error_if_nonfinite=True)
    for got, expected in zip(gradients, before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_within_the_norm_are_not_written():
    """Writing to a read-only page would end the process."""
    page = mmap.mmap(-1, 4 * 70_000, prot=mmap.PROT_READ)
    with pytest.warns(UserWarning, match="not writable"):
        gradient = torch.frombuffer(page, dtype=torch.float32)
    assert clip_grad_norm_(parameters_of([gradient]), 1.0) == 0


def test_the_version_counter_moves_as_torchs_does():
    parameters = parameters_of([torch.full((70_000,), 1e-4)])
    version = parameters[0].grad._version
    clip_grad_norm_(parameters, 1e-3)
    assert parameters[0].grad._version == version + 1
    torch.testing.assert_close(parameters[0].grad.norm(), torch.tensor(1e-3), rtol=2e-3, atol=0)


def test_what_parameters_may_be(generator):
    gradient = torch.randn(100, generator=generator)
    for make in (lambda p: p[0], lambda p: iter(p), lambda p: (q for q in p), tuple):
        parameters = parameters_of([gradient.clone()])
        norm = clip_grad_norm_(make(parameters), 0.5)
        torch.testing.assert_close(norm, gradient.norm(), rtol=1e-6, atol=0)
        torch.testing.assert_close(parameters[0].grad.norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
    for nothing in ([], parameters_of([None])):
        assert torch.equal(clip_grad_norm_(nothing, 1.0), torch.tensor(0.0))
    with pytest.warns(UserWarning, match="empty generator, no gradient clipping"):
        clip_grad_norm_((p for p in []), 1.0)


def test_tied_and_empty_gradients(generator):
    shared = torch.randn(1000, generator=generator)
    wanted, got = shared.clone(), shared.clone()
    nn.utils.clip_grad_norm_(parameters_of([wanted, wanted]), 1.0)
    clip_grad_norm_(parameters_of([got, got]), 1.0)
    assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match="empty tensor"):  # torch's own
        clip_grad_norm_(parameters_of([torch.zeros(0)]), 1.0, "inf")


def test_sparse_gradients_are_torchs_error():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    errors = []
    for clip in (nn.utils.clip_grad_norm_, clip_grad_norm_):
        with pytest.raises(NotImplementedError) as raised:
            clip(embedding.parameters(), 1.0)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    with pytest.raises(TypeError, match="expected dense tensors"):
        clip_grad_norm_(embedding.parameters(), 1.0, return_statistics=True)


@pytest.mark.parametrize("norm_type", [2.0, "inf", 1.0])
def test_statistics_are_of_the_gradients_before_clipping(norm_type, generator):
    gradients = [torch.randn(n, generator=generator) for n in (10, 70_000)]
    before = clones(gradients)
    histogram = torch.zeros(2, BINS, dtype=torch.int64)
    norm, stats = clip_grad_norm_(
        parameters_of(gradients), 0.1, norm_type, return_statistics=True, histogram=histogram
    )
    assert stats.histogram is histogram
    check(stats, before)
    wanted = nn.utils.get_total_norm(before, float(norm_type))
    torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
    clipped = nn.utils.get_total_norm(gradients, float(norm_type))
    torch.testing.assert_close(clipped, torch.tensor(0.1), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="at least one tensor"):
        clip_grad_norm_(parameters_of([None]), 1.0, return_statistics=True)


def test_operator_keeps_torchs_contract(generator):
    tensors = [torch.randn(n, generator=generator) for n in (10, 30)]
    coefficient = torch.tensor(0.5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.pyvizllm.scale_.default, (tensors, coefficient))
    for strided in (
        torch.ones(4, 3).t(),
        torch.ones(1, 3).expand(4, 3),
        torch.ones(2, 2, 4)[..., :3],
    ):
        with pytest.raises(RuntimeError, match="scale_: expected contiguous tensors, or matrices"):
            torch.ops.pyvizllm.scale_([strided], coefficient)
    for wrong in (torch.tensor(0.5), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="scale_: expected coefficient to be one float64"):
            torch.ops.pyvizllm.scale_(tensors, wrong)


def test_two_gradients_on_one_memory_are_scaled_twice_as_in_torch():
    results = []
    for clip in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        parameters = [
            torch.nn.Parameter(torch.zeros(300, 200)),
            torch.nn.Parameter(torch.zeros(60000)),
        ]
        parameters[0].grad = torch.ones(300, 200)
        parameters[1].grad = parameters[0].grad.view(-1)
        clip(parameters, 1.0)
        results.append(parameters[0].grad)
    assert torch.equal(*results)
