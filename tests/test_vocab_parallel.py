"""Vocabulary-parallel losses in two and three gloo processes, against float64 of the whole rows.

The processes are started once for each number of ranks (torch takes seconds to start), run all
cases of vocab_parallel_ranks.py and leave their results in files; each test looks at some of them.
50 classes: less than two vectors of any rank, so that every slice has a tail.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import F32_EPS, assert_within_one_ulp, ulp
from torch import Tensor
from vocab_parallel_ranks import CASES, CHUNK, LINEAR_CASES, SLICES, Case, sentence

from pyvizllm.ops import (
    CrossEntropyMetrics,
    cross_entropy,
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

RANKS = Path(__file__).with_name("vocab_parallel_ranks.py")
COUNTS = (0, 1, 6, *range(8, 38))  # metrics that are numbers of tokens


@pytest.fixture(scope="module", params=(2, 3), ids=("two ranks", "three ranks"))
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(RANKS.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(request.param), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(request.param)
    ]  # fmt: skip
    try:
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), output
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@dataclass
class Reference:
    """Float64, from the same logits, by torch's autograd."""

    loss: Tensor
    loss_error: Tensor  # what float32 internals may add to the error
    gradient: Tensor  # [rows, classes]
    gradient_error: Tensor
    sums: Tensor  # [53]


def reference(case: Case) -> Reference:
    logits, target, upstream = case.tensors()
    options = {"reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, **case.options}
    smoothing, z_loss = options["label_smoothing"], options["z_loss"]
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap", 0.0)
    x = logits.double().requires_grad_()
    z = x * scale
    z = cap * torch.tanh(z / cap) if cap else z
    z.retain_grad()
    log_p, log_sum_exp = z.log_softmax(1), z.logsumexp(1)
    counts = target != case.ignore_index
    index = target.where(counts, 0)[:, None]
    nll = -log_p.gather(1, index)[:, 0]
    loss = nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * log_p.mean(1)
    loss = torch.where(counts, loss + (z_loss * log_sum_exp**2 if z_loss else 0), 0)
    divisor = counts.sum() if options["reduction"] == "mean" else 1
    reduced = loss if options["reduction"] == "none" else loss.sum() / divisor
    reduced.backward(upstream.double())

    with torch.no_grad():
        p = log_p.exp()
        distance = (z - z.amax(1, keepdim=True)).clamp(min=-105).abs()
        rounded = z.abs() if "logit_scale" in options or cap else torch.zeros_like(z)
        relative = F32_EPS * (distance + rounded + 8)
        z_factor = (2 * z_loss * log_sum_exp[:, None]).abs()
        row_scale = (upstream.double() / divisor).abs().expand(len(z)).where(counts, 0)[:, None]
        terms = p * (1 + z_factor) + smoothing / z.shape[1]
        terms = terms.scatter_add(1, index, torch.full_like(terms[:, :1], 1.0))
        gradient_error = abs(scale) * row_scale * terms * relative
        row_error = relative.amax(1) * (1 + z_factor[:, 0])
        loss_error = torch.where(counts, row_error, 0)
        if options["reduction"] != "none":
            loss_error = loss_error.sum() / divisor
    # In order of the logits before the cap, which may round them to one number.
    order = logits.double() * ((scale > 0) - (scale < 0))
    sums = metric_sums(z.detach(), order, p, index[:, 0], counts)
    return Reference(reduced.detach(), loss_error, x.grad, gradient_error, sums)


def metric_sums(z: Tensor, order: Tensor, p: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    z, order, p, target = z[counts], order[counts], p[counts], target[counts, None]
    z_t, at_target = z.gather(1, target), order.gather(1, target)
    classes = torch.arange(z.shape[1])
    before = (order > at_target) | ((order == at_target) & (classes < target))
    rank = before.sum(1).double()
    rank[p.isnan().any(1)] = torch.nan
    top = p.amax(1)
    entropy = torch.special.entr(p).sum(1)
    margin = z_t - z.scatter(1, target, -torch.inf).amax(1, keepdim=True)
    log_p = z.log_softmax(1)
    means = (
        torch.ones_like(rank), rank == 0, -log_p.gather(1, target)[:, 0], entropy,
        z.logsumexp(1), top, rank < 5, margin[:, 0],
    )  # fmt: skip
    bins = [(top > i / 15) & (top <= (i + 1) / 15) for i in range(15)]
    kinds = (torch.ones_like(rank), (rank == 0).double(), top)
    calibration = [value[in_bin].sum() for value in kinds for in_bin in bins]
    return torch.stack([*(value.double().sum() for value in means), *calibration])


def assert_loss(got: Tensor, expected: Reference) -> None:
    known = ~expected.loss.isnan()
    assert torch.equal(got.isnan(), ~known)
    assert_within_one_ulp(got[known], expected.loss[known], expected.loss_error[known])


def assert_gradient(got: Tensor, expected: Reference) -> None:
    known = ~expected.gradient.isnan()
    assert torch.equal(got.isnan(), ~known)
    assert_within_one_ulp(got[known], expected.gradient[known], expected.gradient_error[known])


def assert_sums(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    counts = list(COUNTS)
    assert got.dtype == torch.float64
    assert torch.equal(got[counts], expected[counts])
    if not expected.isnan().any():
        tolerance = 1e-11 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def whole_gradient(ranks: list[dict[str, Any]], name: str, key: str, dim: int = 1) -> Tensor:
    return torch.cat([rank[name][key] for rank in ranks], dim)


@pytest.mark.parametrize("name", CASES)
def test_is_float64_of_whole_rows(ranks, name):
    case = CASES[name]
    expected = reference(case)
    assert ranks[0][name]["loss"].dtype == case.dtype
    assert_loss(ranks[0][name]["loss"], expected)
    assert_sums(ranks[0][name]["sums"], expected.sums, case.dtype)
    for rank, classes in zip(ranks, SLICES[len(ranks)][case.slices], strict=True):
        assert rank[name]["grad"].shape[1] == classes
    gradient = whole_gradient(ranks, name, "grad")
    assert gradient.dtype == case.dtype
    assert_gradient(gradient, expected)
    ignored = case.tensors()[1] == case.ignore_index
    assert torch.equal(gradient[ignored], torch.zeros_like(gradient[ignored]))


@pytest.mark.parametrize("name", CASES)
def test_is_cross_entropy_of_whole_rows(ranks, name):
    """The product's own result in one process: an independent path to the same numbers."""
    case = CASES[name]
    logits, target, upstream = case.tensors()
    logits.requires_grad_()
    loss, metrics = cross_entropy(logits, target, **case.options, return_metrics=True)
    loss.backward(upstream)
    expected = reference(case)
    got = ranks[0][name]
    finite = ~loss.isnan()
    error = (got["loss"] - loss).detach().double().abs()[finite]
    size = loss.detach().double().abs()
    assert bool((error <= (2 * expected.loss_error + ulp(size, loss.dtype))[finite]).all())
    assert_sums(got["sums"], metrics.sums, case.dtype)
    error = (whole_gradient(ranks, name, "grad") - logits.grad).double().abs()
    allowed = 2 * expected.gradient_error + ulp(logits.grad.double().abs(), case.dtype)
    assert bool(((error <= allowed) | logits.grad.isnan()).all())


@pytest.mark.parametrize("name", CASES)
def test_per_token(ranks, name):
    """Ranks are counted over all slices, also beyond five."""
    case = CASES[name]
    logits, target, _ = case.tensors()
    options = {key: case.options[key] for key in ("softcap", "logit_scale") if key in case.options}
    _, metrics = cross_entropy(
        logits, target, ignore_index=case.ignore_index, return_metrics="per_token", **options
    )
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
    for rank in ranks:
        got = rank[name]["per token"]
        assert torch.equal(got["rank"], metrics.per_token.rank)
        for key in ("loss", "entropy"):
            expected = getattr(metrics.per_token, key)
            torch.testing.assert_close(
                got[key], expected, rtol=tolerance, atol=tolerance, equal_nan=True
            )


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_and_repeat(ranks, name):
    """All ranks have the same bits, whatever their threads; so has a second backward, and a call
    without metrics."""
    for rank in ranks:
        got = rank[name]
        for key in ("loss", "sums"):
            torch.testing.assert_close(
                got[key], ranks[0][name][key], rtol=0, atol=0, equal_nan=True
            )
        for key, same in (("loss", "alone"), ("grad", "again"), ("grad", "grad alone")):
            torch.testing.assert_close(got[same], got[key], rtol=0, atol=0, equal_nan=True)


def test_smoothing_is_over_all_classes(ranks):
    """Megatron-LM issue 737: smoothing by a rank's number of classes, or of its classes alone."""
    case = CASES["smoothing"]
    logits, target, _ = case.tensors()
    expected = F.cross_entropy(
        logits.double(), target, reduction="none", label_smoothing=case.options["label_smoothing"]
    )
    torch.testing.assert_close(
        ranks[0]["smoothing"]["loss"].double(), expected, rtol=1e-6, atol=1e-6
    )


def test_group_of_two_of_three(ranks):
    if len(ranks) == 2:
        assert "group" not in ranks[0]
        return
    expected = reference(CASES["smoothing"])
    assert "expected a group with this process" in ranks[0]["group"]
    for rank in ranks[1:]:
        assert_loss(rank["group"]["loss"], expected)
    assert_gradient(whole_gradient(ranks[1:], "group", "grad"), expected)


def test_shapes(ranks):
    logits, target, _ = CASES["plain"].tensors()
    logits.requires_grad_()
    got = [rank["shapes"] for rank in ranks]
    one, every = slice(1), slice(None)
    whole_rows = (("vector", one, 0), ("vector of one target", one, 0), ("images", every, 1))
    for name, rows, dim in whole_rows:
        chosen, index = logits[rows], target[rows]
        expected = cross_entropy(chosen, index, reduction="sum")
        (grad,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(got[0][name], expected.detach(), rtol=1e-6, atol=0)
        whole = torch.cat([rank[name + " grad"] for rank in got], dim)
        if name == "images":
            whole = whole.movedim(1, -1)
        torch.testing.assert_close(whole.reshape(-1, 50), grad[rows], rtol=1e-5, atol=1e-7)
    counts = SLICES[len(ranks)][0 if len(ranks) == 3 else 1]
    for rank, classes in zip(got, counts, strict=True):
        assert rank["empty"] == 0
        assert rank["empty grad"].shape == (0, classes)
        assert rank["smoothed away"] == torch.inf  # not 0 * Inf, of the target's own share


def test_collectives(ranks):
    """(All-gathers, all-reduces): records, and for metrics counts; chunks of 18 tokens are four."""
    expected = {
        "plain": (1, 0),
        "asking": (2, 0),
        "metrics": (1, 1),
        "linear": (4, 1),
        "linear none": (4, 0),
    }
    backward = dict.fromkeys(expected, (0, 0)) | {"linear none": (0, 1)}
    expected |= {f"{name} backward": made for name, made in backward.items()}
    for rank in ranks:
        assert rank["collectives"] == expected


def test_errors_are_sentences_on_all_ranks(ranks):
    expected = {
        "target": "IndexError: {}: target 50 at position 4 is out of bounds: expected "
        "0 <= target < 50 or ignore_index = -100",
        "rows": "ValueError: {}: expected the same tokens on all ranks, got "
        f"{[18 - rank for rank in range(len(ranks))]} tokens",
        "second derivative": "RuntimeError: {}: expected create_graph=False",
        "shape": "ValueError: {}: Expected input batch_size (18) to match target",
        "reduction": "ValueError: {}: expected reduction 'none', 'mean' or 'sum'",
        "smoothing": "RuntimeError: {}: label_smoothing must be between 0.0 and 1.0",
        "class_counts": f"ValueError: {{}}: expected class_counts of {len(ranks)} ranks",
        "dtype": "NotImplementedError: {}: expected input of float32",
        "probabilities": "NotImplementedError: {}: expected class",
        "softcap": "ValueError: {}: expected a finite softcap of at least",
        "tensor": "TypeError: {}: expected z_loss to be a number",
    }
    for rank in ranks:
        assert set(rank["errors"]) == set(expected)
        for name, text in expected.items():
            got = rank["errors"][name]
            assert got.startswith(text.format("vocab_parallel_cross_entropy")), got


def test_errors_of_the_linear_layer_on_all_ranks(ranks):
    expected = {
        "target": "IndexError: {}: target 50 at position 4 is out of bounds",
        "shape": "ValueError: {}: expected target of shape [18] for input",
        "weight": "ValueError: {}: expected input [..., H] and weight [C, H]",
        "dtype": "ValueError: {}: expected weight of input's dtype torch.float32",
        "reduction": "ValueError: {}: expected reduction 'none', 'mean' or 'sum'",
        "class_counts": "ValueError: {}: expected class_counts of",
        "second derivative": "RuntimeError: {}: expected create_graph=False",
    }
    for rank in ranks:
        assert set(rank["linear errors"]) == set(expected)
        for name, text in expected.items():
            got = rank["linear errors"][name]
            assert got.startswith(text.format("vocab_parallel_linear_cross_entropy")), got


def test_needs_process_groups():
    got = sentence(lambda: vocab_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1])))
    words = "expected an initialized torch.distributed"
    assert got.startswith(f"RuntimeError: vocab_parallel_cross_entropy: {words}")


def test_options_are_named():
    """A third position would be `weight` to who comes from `cross_entropy`."""
    layer = ["input", "weight", "target", "bias"]
    for function, tensors in (
        (vocab_parallel_cross_entropy, ["input", "target"]),
        (vocab_parallel_linear_cross_entropy, layer),
        (linear_cross_entropy, layer),
    ):
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        assert positional == tensors


# -- Linear ----------------------------------------------------------------------------------------


def linear_reference(case: Case, bias: bool) -> dict[str, Tensor]:
    """Loss and gradients in float64 of the same hidden states and weight."""
    _, target, upstream = case.tensors()
    leaves = [tensor.double().requires_grad_() for tensor in case.layer()]
    hidden, weight, shift = leaves
    z = F.linear(hidden, weight, shift if bias else None)
    options = dict(case.options)
    cap, z_loss = options.pop("softcap", 0.0), options.pop("z_loss", 0.0)
    z = cap * torch.tanh(z / cap) if cap else z
    loss = F.cross_entropy(z, target, **options)
    if z_loss:
        assert options["reduction"] == "sum"
        loss = loss + z_loss * (z.logsumexp(1) ** 2)[target != -100].sum()
    loss.backward(upstream.double())
    names = ("input", "weight", "bias") if bias else ("input", "weight")
    return {"loss": loss.detach()} | {n: leaf.grad for n, leaf in zip(names, leaves, strict=False)}


def assert_linear(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Relative to the largest: logits of 16 bits are rounded before the loss, and their gradients
    before the products."""
    tolerances = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
    tolerance = tolerances[dtype or got.dtype]
    error = (got.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", [*LINEAR_CASES, "without bias"])
def test_linear(ranks, name):
    bias = name != "without bias"
    case = LINEAR_CASES[name] if bias else LINEAR_CASES["plain"]
    got = [rank["linear"][name] if bias else rank["linear without bias"] for rank in ranks]
    expected = linear_reference(case, bias)
    assert len(case.tensors()[1]) % CHUNK != 0
    assert_linear(got[0]["loss"], expected["loss"])
    assert_linear(got[0]["input"], expected["input"])
    for key in ("weight", "bias")[: 1 + bias]:
        assert_linear(torch.cat([rank[key] for rank in got]), expected[key])
    if not bias:
        assert got[0]["bias"] is None
    for rank in got:
        for key in ("loss", "sums", "input"):  # the same bits on all ranks
            assert torch.equal(rank[key], got[0][key])
        for key in ("input", "weight", "bias")[: 2 + bias]:
            assert torch.equal(rank[key + " again"], rank[key])
    assert CrossEntropyMetrics(got[0]["sums"]).tokens == 16


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_linear_ranks_of_tokens(ranks, name):
    """Of all chunks together, those of the logits that the layer gives in its dtype."""
    case = LINEAR_CASES[name]
    hidden, weight, bias = (tensor.double() for tensor in case.layer())
    target = case.tensors()[1]
    counts = target != -100
    z = F.linear(hidden, weight, bias)
    z_t = z.gather(1, target.where(counts, 0)[:, None])
    # No two logits are closer than the layer's rounding, but in 16 bits.
    slack = z.abs().amax() * 2.0**-7 if case.dtype == torch.bfloat16 else 0
    least = (z > z_t + slack).sum(1)
    most = (z >= z_t - slack).sum(1) - 1
    for rank in ranks:
        got = rank["linear"][name]["ranks"]
        assert bool(((got >= least) & (got <= most))[counts].all())
        assert bool((got[~counts] == -1).all())


def test_linear_under_autocast(ranks):
    """Products in bfloat16, gradients in the parameters' float32."""
    expected = linear_reference(LINEAR_CASES["plain"], True)
    got = [rank["linear under autocast"] for rank in ranks]
    assert_linear(got[0]["loss"], expected["loss"], torch.bfloat16)
    assert_linear(got[0]["input"], expected["input"], torch.bfloat16)
    for key in ("weight", "bias"):
        whole = torch.cat([rank[key] for rank in got])
        assert whole.dtype == torch.float32
        assert_linear(whole, expected[key], torch.bfloat16)
        assert not torch.equal(whole, whole.bfloat16().float())  # not rounded to 16 bits


# -- DTensor ---------------------------------------------------------------------------------------


def test_dtensors(ranks):
    expected = reference(CASES["smoothing"])
    linear = linear_reference(LINEAR_CASES["plain"], True)
    linear_scale = LINEAR_CASES["plain"].tensors()[2].double()  # the DTensor's upstream is 1
    errors = {
        "placements": "ValueError: cross_entropy: expected logits sharded on dimension 1 (the",
        "class weights": "NotImplementedError: cross_entropy: expected no class weights for",
        "plain hidden states": "TypeError: linear_cross_entropy: expected input to be a DTensor",
        "plain bias": "ValueError: linear_cross_entropy: expected bias placed as the weight",
        "replicated weight": "ValueError: linear_cross_entropy: expected logits sharded on",
    }
    for rank in ranks:
        got = rank["dtensor"]
        assert_loss(got["loss"], expected)
        assert_gradient(got["grad"], expected)
        assert_sums(got["sums"], expected.sums, torch.float32)
        for name, text in errors.items():
            assert got["errors"][name].startswith(text), got["errors"][name]
        for placement in ("S(0)", "R"):
            ours, torchs = got[placement]
            torch.testing.assert_close(ours, torchs, rtol=0, atol=0)
        target = CASES["smoothing"].tensors()[1]
        hidden, weight, bias = LINEAR_CASES["plain"].layer()
        logits = F.linear(hidden, weight, bias)
        torch.testing.assert_close(got["replicated"], F.cross_entropy(logits, target))
        assert_linear(got["linear"]["loss"], linear["loss"])
        for key in ("input", "weight", "bias"):
            assert_linear(got["linear"][key], linear[key] / linear_scale)
