"""linear_cross_entropy against the composition of torch's operations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import seeded
from peak_memory import peak_bytes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pyvizllm.nn import LinearCrossEntropyLoss
from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.linear_cross_entropy import linear_cross_entropy
from pyvizllm.ops.linear_cross_entropy_autograd import linear_cross_entropy_op

# 37 tokens: not a multiple of the chunk of 8. 1031 classes: odd, and more than one block of 1024 on
# the CPU. 19 features: odd, so that half of a bfloat16 gradient is no round number of bytes.
TOKENS, FEATURES, CLASSES = 37, 19, 1031
REDUCTIONS = ("mean", "sum", "none")
# Relative to the largest element, of a reference in float64. Low precision rounds the logits, as
# F.linear does, and once more their gradients.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def layer(dtype=torch.float64, bias=True, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(seed)

    def randn(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    target = torch.randint(CLASSES, (TOKENS,), generator=generator)
    target[[0, 5, 6, 36]] = -100
    return randn(TOKENS, FEATURES), randn(CLASSES, FEATURES), target, randn(CLASSES)


def capped(logits: Tensor, softcap: float, logit_scale: float) -> Tensor:
    logits = logits * logit_scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def reference(
    input, weight, target, bias, *, class_weight=None, z_loss=0.0, softcap=0.0, logit_scale=1.0,
    reduction="mean", **options,
) -> Tensor:  # fmt: skip
    logits = capped(F.linear(input, weight, bias), softcap, logit_scale)
    rows = F.cross_entropy(logits, target, class_weight, reduction="none", **options)
    counts = torch.ones(len(rows), dtype=rows.dtype)
    if not target.is_floating_point():
        counts = (target != options.get("ignore_index", -100)).to(rows.dtype)
        if class_weight is not None:
            counts = counts * class_weight[target.clamp(min=0)]
    rows = rows + z_loss * counts * logits.logsumexp(1) ** 2
    if reduction == "none":
        return rows
    return rows.sum() / counts.sum() if reduction == "mean" else rows.sum()


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max(), f"{error} of {expected.abs().max()}"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk_size", [None, 8, 1, 1000])
def test_loss_and_gradients(dtype, reduction, chunk_size):
    x, w, target, b = layer(dtype)
    loss = linear_cross_entropy(x, w, target, b, reduction=reduction, chunk_size=chunk_size)
    upstream = torch.linspace(0.5, 2, TOKENS) if reduction == "none" else torch.tensor(3.0)
    got = torch.autograd.grad(loss, (x, w, b), upstream.to(loss.dtype))
    wide = doubled(x, w, b)
    expected = reference(wide[0], wide[1], target, wide[2], reduction=reduction)
    assert loss.dtype == dtype
    assert loss.shape == expected.shape
    assert_close(loss, expected, dtype)
    for ours, theirs in zip(
        got, torch.autograd.grad(expected, wide, upstream.double()), strict=True
    ):
        assert ours.dtype == dtype
        assert_close(ours, theirs, dtype)


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.25},
    "class weights": {"class_weight": torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)},
    "all": {
        "label_smoothing": 0.2,
        "z_loss": 1e-3,
        "softcap": 10.0,
        "logit_scale": -0.5,
        "class_weight": torch.linspace(0.1, 3, CLASSES, dtype=torch.float64),
    },
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, probabilities, reduction):
    x, w, target, b = layer()
    if probabilities:
        target = torch.randn(TOKENS, CLASSES, dtype=torch.float64).softmax(1)
    options = {**OPTIONS[name], "reduction": reduction}
    if "class_weight" in options:
        options["class_weight"] = options["class_weight"].to(x.device)
    loss = linear_cross_entropy(x, w, target, b, chunk_size=8, **options)
    expected = reference(x, w, target, b, **options)
    assert_close(loss, expected, torch.float64)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    got = torch.autograd.grad(loss, (x, w, b), upstream)
    for ours, theirs in zip(got, torch.autograd.grad(expected, (x, w, b), upstream), strict=True):
        assert_close(ours, theirs, torch.float64)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_metrics_are_those_of_all_logits(reduction):
    x, w, target, b = layer(torch.float32)
    _, got = linear_cross_entropy(
        x, w, target, b, reduction=reduction, return_metrics=True, chunk_size=8
    )
    _, expected = cross_entropy(F.linear(x, w, b), target, return_metrics=True)
    assert got.sums.shape == (53,)
    torch.testing.assert_close(got.sums, expected.sums, rtol=1e-5, atol=1e-5)
    assert got.tokens == TOKENS - 4


def test_metrics_of_each_token():
    x, w, target, b = layer(torch.float32)
    shaped = target[:36].reshape(4, 9)
    _, got = linear_cross_entropy(
        x[:36].reshape(4, 9, -1), w, shaped, b, return_metrics="per_token", chunk_size=8
    )
    _, expected = cross_entropy(F.linear(x[:36], w, b), target[:36], return_metrics="per_token")
    assert got.per_token.rank.shape == (4, 9)
    assert got.per_token.rank[0, 0] == -1  # an ignored one
    assert torch.equal(got.per_token.rank.flatten(), expected.per_token.rank)
    for name in ("loss", "entropy"):
        ours, theirs = getattr(got.per_token, name), getattr(expected.per_token, name)
        torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_what_is_asked_for(needs, reduction):
    x, w, target, b = layer()
    tensors = [tensor.requires_grad_(need) for tensor, need in zip((x, w, b), needs, strict=True)]
    with profile(activities=[ProfilerActivity.CPU]) as record:
        loss = linear_cross_entropy(x, w, target, b, reduction=reduction, chunk_size=64)
        loss.sum().backward()
    expected = reference(x, w, target, b, reduction=reduction).sum()
    wanted = next(tensor for tensor in tensors if tensor.requires_grad)
    assert_close(wanted.grad, *torch.autograd.grad(expected, wanted), torch.float64)
    assert sum(tensor.grad is not None for tensor in tensors) == 1
    # Two blocks of classes; again in the backward without a reduction; and one for the gradient.
    logits = 4 if reduction == "none" else 2
    products = [e for e in record.events() if e.name in ("aten::addmm", "aten::mm")]
    assert len(products) == logits + (not needs[2])


def test_nothing_is_recorded_without_gradients():
    x, w, target, b = layer()
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, target, b)
    assert not loss.requires_grad
    assert_close(loss, reference(x, w, target, b), torch.float64)
    with torch.inference_mode():
        assert_close(linear_cross_entropy(x, w, target, b), loss, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_memory_that_was_not_written_is_not_read(dtype):
    """257 classes: a whole cache line and one. Deterministic mode fills new memory with NaN."""
    x = torch.randn(70, 16).to(dtype).requires_grad_()
    w = torch.randn(257, 16).to(dtype).requires_grad_()
    b = torch.randn(257).to(dtype).requires_grad_()
    target = torch.randint(257, (70,))
    torch.use_deterministic_algorithms(True)
    try:
        for reduction in REDUCTIONS:
            loss = linear_cross_entropy(x, w, target, b, reduction=reduction)
            for grad in torch.autograd.grad(loss, (x, w, b), torch.ones_like(loss)):
                assert grad.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_counts(reduction):
    x, w, target, b = layer()
    target.fill_(-100)
    loss = linear_cross_entropy(x, w, target, b, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    loss.sum().backward()
    assert x.grad.abs().sum() + w.grad.abs().sum() + b.grad.abs().sum() == 0


def test_no_tokens():
    x, w, target, b = layer()
    loss = linear_cross_entropy(x[:0], w, target[:0], b, reduction="sum")
    loss.backward()
    assert loss == 0
    assert w.grad.abs().sum() == 0
    probabilities = torch.zeros(0, CLASSES, dtype=torch.float64)
    loss = linear_cross_entropy(x[:0], w, probabilities, b)
    assert loss.isnan()
    assert torch.equal(torch.autograd.grad(loss, b)[0], torch.zeros_like(b))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_twice(reduction):
    generator = seeded(0)
    x, w, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (7, 3), (7,))
    )
    target = torch.tensor([1, 0, -100, 6, 2])

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, w, target, b, reduction=reduction, label_smoothing=0.1, z_loss=0.01, softcap=3.0,
            chunk_size=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (x, w, b))
    assert torch.autograd.gradgradcheck(loss, (x, w, b))


def test_upstream_gradients_and_retained_graphs():
    x, w, target, b = layer()
    loss = linear_cross_entropy(x, w, target, b)
    first = torch.autograd.grad(loss, (x, w, b), torch.tensor(2.0).double(), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w, b))
    for twice, once in zip(first, second, strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-14, atol=0)


def test_tied_to_the_embedding():
    _, w, target, _ = layer()
    tokens = target.clamp(min=0)

    def gradient(loss) -> Tensor:
        return torch.autograd.grad(loss(F.embedding(tokens, w), w, target), w)[0]

    got = gradient(linear_cross_entropy)
    expected = gradient(lambda x, w, t: F.cross_entropy(F.linear(x, w), t))
    assert_close(got, expected, torch.float64)


def test_autocast_keeps_gradients_of_float32_weights_in_float32():
    x, w, target, b = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, target, b, chunk_size=8)
        expected = F.cross_entropy(F.linear(x, w, b), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    got = torch.autograd.grad(loss, (x, w, b))
    wide = doubled(*(t.bfloat16() for t in (x, w, b)))
    exact = torch.autograd.grad(reference(wide[0], wide[1], target, wide[2]), wide)
    theirs = torch.autograd.grad(expected, (x, w, b))
    for ours, float64, torchs in zip(got, exact, theirs, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, float64, torch.bfloat16)
        error, of_torch = ((g.double() - float64).norm() for g in (ours, torchs))
        assert error <= 1.05 * of_torch


def test_weight_gradient_is_summed_in_float32():
    """512 chunks of one token: sums in bfloat16 would stop growing at 256 times a term."""
    x = torch.ones(512, 2, dtype=torch.bfloat16)
    w = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(512, dtype=torch.int64)
    linear_cross_entropy(x, w, target, reduction="sum", chunk_size=1).backward()
    third = torch.tensor(1 / 3).bfloat16().double()
    assert w.grad[1, 0].double() == (512 * third).bfloat16().double()


def test_float16_gradients_wait_for_the_loss_scale():
    x = torch.full((1, 1), 1e-3, dtype=torch.float16, requires_grad=True)
    w = torch.zeros(4, 1, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(8192, dtype=torch.int64)
    target[1:] = 1
    loss = linear_cross_entropy(x.expand(8192, 1), w, target)
    (loss * 4096).backward()
    # Class 0: (8192 / 4 - 1) / 8192 * 1e-3, which float16 holds; its terms of 3e-8 it does not.
    assert abs(w.grad[0].item() / 4096 - x.item() * (2048 - 1) / 8192) < 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float16_gradients_of_a_confident_model(reduction):
    """Most rows of the weight have gradients of less than float16 has, but for the loss scale."""
    generator = seeded(3)
    x = torch.randn(64, 8, generator=generator)
    w = torch.randn(50257, 8, generator=generator) * 0.2
    target = torch.randint(100, (64,), generator=generator)
    x[:, 0], w[:, 0] = 4.0, 0.0
    x[torch.arange(64), 1] = 1.0
    w[:100, 0] = 3.25  # the first hundred are likely: others get 2e-8, which float16 has not
    x, w = (tensor.half().float().requires_grad_() for tensor in (x, w))
    upstream = torch.full((64,) if reduction == "none" else (), 65536.0)  # a loss scale
    with torch.autocast(x.device.type, torch.float16):
        loss = linear_cross_entropy(x, w, target, reduction=reduction, chunk_size=16)
    got = torch.autograd.grad(loss, (x, w), upstream)
    wide = doubled(x, w)
    exact = torch.autograd.grad(
        reference(wide[0], wide[1], target, None, reduction=reduction), wide, upstream.double()
    )
    for ours, float64 in zip(got, exact, strict=True):
        assert_close(ours, float64, torch.float16)
    assert_close(got[1][100:], exact[1][100:], torch.float16)


@pytest.mark.parametrize("case", ["z_loss", "probabilities", "class weights"])
def test_large_gradients_fit_float16(case):
    """Its scale leaves room for what makes gradients of the logits larger than 1."""
    x, w, target, b = layer(torch.float16)
    options = {
        "z_loss": {"z_loss": 0.5},
        "probabilities": {},
        "class weights": {"class_weight": torch.linspace(1, 300, CLASSES)},
    }[case]
    if case == "probabilities":
        target = torch.rand(TOKENS, CLASSES, generator=seeded(4)) / 8  # sums of some 64
    loss = linear_cross_entropy(x, w, target, b, reduction="mean", **options)
    got = torch.autograd.grad(loss, (x, w, b))
    wide = doubled(x, w, b)
    target = target.double() if target.is_floating_point() else target
    options = {n: v.double() if isinstance(v, Tensor) else v for n, v in options.items()}
    exact = torch.autograd.grad(reference(wide[0], wide[1], target, wide[2], **options), wide)
    for ours, float64 in zip(got, exact, strict=True):
        assert_close(ours, float64, torch.float16)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_without_a_break(reduction):
    x, w, target, b = layer()  # in float64: the compiler may multiply by 3 before or after a sum
    hidden = x.detach().clone().requires_grad_()
    compiled = torch.compile(
        lambda x: linear_cross_entropy(x * 2, w, target, b, reduction=reduction).sum() * 3,
        fullgraph=True,
        backend="aot_eager",
    )
    got = torch.autograd.grad(compiled(hidden), (hidden, w, b))
    eager = linear_cross_entropy(x * 2, w, target, b, reduction=reduction).sum() * 3
    for ours, theirs in zip(got, torch.autograd.grad(eager, (x, w, b)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operator_is_what_it_says(reduction):
    x, w, target, b = layer(torch.float32)
    options = (-100, 0.0, 0.0, 0.0, 1.0, reduction, 2, 8, torch.float32, [True] * 3)
    target.clamp_(min=0)  # records of ignored tokens are NaN, which opcheck finds unequal
    torch.library.opcheck(linear_cross_entropy_op, (x, w, target, b, None, *options))


def test_memory_when_compiled():
    """One chunk of logits, and the gradients a second time, when the upstream one is applied."""
    torch._dynamo.reset()
    x = torch.randn(1024, 192, requires_grad=True)
    w = torch.randn(6007, 192, requires_grad=True)
    target = torch.randint(6007, (1024,))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    compiled(x, w, target).backward()
    x.grad = w.grad = None
    gradients = 4 * (x.numel() + w.numel())
    extra = peak_bytes(lambda: compiled(x, w, target).backward()) - 2 * gradients
    assert extra < 4 * 1024 * 6007 / 8


def test_input_that_is_made_of_the_weight_differentiated_twice():
    """Hooks of both see the whole gradient, once."""
    generator = seeded(1)
    w = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target, seen = torch.tensor([0, 3, 4]), []
    x = w[:3] * 2
    x.register_hook(seen.append)
    expected_loss = F.cross_entropy(F.linear(x, w), target)
    (expected,) = torch.autograd.grad(expected_loss, w, create_graph=True)
    (got,) = torch.autograd.grad(linear_cross_entropy(x, w, target), w, create_graph=True)
    assert_close(got, expected.detach(), torch.float64)
    of_torch, ours = seen
    assert_close(ours, of_torch.detach(), torch.float64)
    second = [
        torch.autograd.grad(g.square().sum(), w, retain_graph=True)[0] for g in (got, expected)
    ]
    assert_close(second[0], second[1], torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_class_weights_of_float32_in_every_derivative(dtype):
    x, w, target, b = layer(dtype)
    class_weight = torch.linspace(0.5, 2, CLASSES)
    upstream = torch.tensor(131072.0)  # which float16 does not hold

    def loss(weight: Tensor, of_classes: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return linear_cross_entropy(x, weight, target, b, class_weight=of_classes)

    wide = doubled(x, w, b)
    exact = reference(wide[0], wide[1], target, wide[2], class_weight=class_weight.double())
    (expected,) = torch.autograd.grad(exact, wide[1])
    for weights in (class_weight, class_weight.to(dtype)):
        (first,) = torch.autograd.grad(loss(w.float(), weights) * 1, w, create_graph=True)
        assert_close(first, expected, dtype)
        assert_close(torch.func.grad(loss)(w, weights), expected, dtype)
    single = w.detach().float().requires_grad_()
    (first,) = torch.autograd.grad(loss(single, class_weight), single, upstream, create_graph=True)
    assert_close(first / upstream, expected, dtype)


def test_probabilities_of_float32_are_not_rounded():
    x, w, _, b = layer(torch.bfloat16)
    target = torch.randn(TOKENS, CLASSES, generator=seeded(2)).softmax(1)
    loss, metrics = linear_cross_entropy(
        x.detach(), w.detach(), target, b.detach(), return_metrics="per_token", chunk_size=8
    )
    logits = F.linear(x, w, b).detach().double()
    expected = F.cross_entropy(logits, target.double(), reduction="none")
    torch.testing.assert_close(metrics.per_token.loss, expected, rtol=1e-6, atol=0)
    assert loss.dtype == torch.bfloat16


def test_gradients_where_no_weight_counts():
    """NaN as the loss, like torch's."""
    x, w, target, b = layer()
    class_weight = torch.zeros(CLASSES, dtype=torch.float64)
    loss = linear_cross_entropy(x, w, target, b, class_weight=class_weight)
    expected = F.cross_entropy(F.linear(x, w, b), target, class_weight)
    assert loss.isnan()
    got, theirs = (torch.autograd.grad(each, b)[0] for each in (loss, expected))
    assert got.isnan().all()
    assert theirs.isnan().all()


def test_transforms_of_torch_func():
    x, w, target, b = layer()
    got = torch.func.grad(lambda w: linear_cross_entropy(x.detach(), w, target, b.detach()))(w)
    expected = torch.autograd.grad(reference(x, w, target, b), w)[0]
    assert_close(got, expected, torch.float64)


def test_same_bits_in_every_run_and_the_same_numbers_for_any_number_of_threads():
    """The products are torch's, which rounds them differently with another number of threads."""
    x, w, target, b = layer(torch.float32)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            loss = linear_cross_entropy(x, w, target, b, chunk_size=8)
            again = linear_cross_entropy(x, w, target, b, chunk_size=8)
            assert torch.equal(loss, again)
            runs.append(torch.autograd.grad(loss, (x, w, b)))
    finally:
        torch.set_num_threads(threads)
    for one, many in zip(*runs, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-7)


def test_memory():
    """1024 x 192 x 6007: a chunk of 103 tokens is a tenth of the logits' 25 MB."""
    x = torch.randn(1024, 192, requires_grad=True)
    w = torch.randn(6007, 192, requires_grad=True)
    target = torch.randint(6007, (1024,))

    def extra(function, **options) -> int:
        """Beside the gradients, which stay."""
        x.grad = w.grad = None
        step = peak_bytes(lambda: function(x, w, target, **options).backward())
        return step - 4 * (x.numel() + w.numel())

    logits = 4 * 1024 * 6007
    ours = extra(linear_cross_entropy)
    assert logits / 10 <= ours < logits / 8
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        assert ours <= extra(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions())


@pytest.mark.parametrize(
    ("error", "change", "words"),
    [
        (ValueError, {"weight": torch.zeros(5, 4)}, r"weight \[C, H\], got \[2, 3\] and \[5, 4\]"),
        (ValueError, {"target": torch.zeros(3).long()}, r"target of shape \[2\].*got \[3\]"),
        (ValueError, {"target": torch.zeros(2, 3)}, r"target of shape \[2, 5\].*got \[2, 3\]"),
        (ValueError, {"bias": torch.zeros(4)}, r"bias of shape \[5\], got \[4\]"),
        (ValueError, {"class_weight": torch.zeros(4)}, r"class_weight of shape \[5\], got \[4\]"),
        (ValueError, {"weight": torch.zeros(5, 3).double()}, "weight of input's dtype"),
        (ValueError, {"chunk_size": 0}, "int chunk_size of at least 1, or None, got 0"),
        (ValueError, {"chunk_size": 2.0}, "int chunk_size of at least 1, or None, got 2.0"),
        (ValueError, {"reduction": "max"}, "expected reduction"),
        (ValueError, {"softcap": -1.0}, "expected a finite softcap of at least 0, got -1.0"),
        (ValueError, {"return_metrics": "all"}, "expected return_metrics .* got 'all'"),
        (TypeError, {"ignore_index": None}, "expected ignore_index to be an int, got None"),
        (RuntimeError, {"label_smoothing": 2.0}, "label_smoothing must be between 0.0 and 1.0"),
        (ValueError, {"weight": torch.zeros(5, 3, device="meta")}, "weight on input's device cpu"),
        (TypeError, {"input": torch.zeros(2, 3).long()}, "input of float32"),
        (TypeError, {"weight": [1.0]}, "weight to be a tensor, got list"),
        (TypeError, {"weight": torch.zeros(5, 3).to_sparse()}, "dense weight"),
        (
            RuntimeError,
            {"target": torch.zeros(2, 5), "ignore_index": 1},
            "not supported for class probabilities, got 1",
        ),
        (IndexError, {"target": torch.tensor([0, 5])}, "target 5 at position 1 is out of bounds"),
        (IndexError, {"target": torch.tensor([-1, 0])}, "target -1 at position 0 is out of bounds"),
    ],
)
def test_errors(error, change, words):
    arguments = {
        "input": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "target": torch.zeros(2).long(),
    }
    with pytest.raises(error, match=f"^linear_cross_entropy: .*{words}"):
        linear_cross_entropy(**(arguments | change))


def test_module():
    loss = LinearCrossEntropyLoss(FEATURES, CLASSES, label_smoothing=0.1, dtype=torch.float64)
    x, _, target, _ = layer()
    got = loss(x, target)
    expected = reference(x, loss.weight, target, loss.bias, label_smoothing=0.1)
    assert_close(got, expected, torch.float64)
    got.backward()
    gradient = torch.autograd.grad(expected, loss.weight)[0]
    assert_close(loss.weight.grad, gradient, torch.float64)
    assert isinstance(loss.weight, nn.Parameter)
    assert repr(loss) == (
        "LinearCrossEntropyLoss(in_features=19, num_classes=1031, bias=True, label_smoothing=0.1)"
    )
    torch.manual_seed(5)
    loss.reset_parameters()
    torch.manual_seed(5)
    assert torch.equal(loss.weight, nn.Linear(FEATURES, CLASSES, dtype=torch.float64).weight)


def test_old_name_of_the_mean():
    x, w, target, b = layer()
    with pytest.warns(UserWarning, match="elementwise_mean"):
        loss = linear_cross_entropy(x, w, target, b, reduction="elementwise_mean")
    assert loss == linear_cross_entropy(x, w, target, b)
