"""cross_entropy in torch's place: the inputs and errors of torch's own tests, scripts and modules.

The reference is torch's operation on float64 copies of the same inputs. Shapes are torch's: a few
tokens of three classes with 0 to 4 dimensions behind them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyvizllm

with warnings.catch_warnings():
    # Of hypothesis, which may be missing: none of its tests are among these.
    warnings.simplefilter("ignore", ImportWarning)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

OPERATIONS = {op.name: op for op in op_db if op.name.endswith((".cross_entropy", ".nll_loss"))}
(MODULE,) = (info for info in module_db if info.module_cls is nn.CrossEntropyLoss)
# One rounding to the dtype, and what float32 sums of a few terms add where they cancel.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2.0**-11, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 2e-6},
}
DTYPES = tuple(TOLERANCES)
MODES = {"recompute": {}, "fused": {"fused": True}}
torch_cross_entropy = F.cross_entropy


@pytest.fixture
def device() -> str:
    """Where the tests run; test_gpu_cross_entropy_drop_in.py has another."""
    return "cpu"


def wide(value: object) -> object:
    """A float64 copy that the gradient can be taken of."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def same_as_torch(
    function,
    input: Tensor,
    target: Tensor,
    options: dict,
    reference=torch_cross_entropy,
    magnitude: float = 1.0,
) -> None:
    """Loss and gradients, of the target's probabilities too, for random upstream gradients.

    magnitude: how large a loss can be that cancels out of its terms.
    """
    x, t = wide(input), wide(target)
    expected = reference(x, t, **{name: wide(value) for name, value in options.items()})
    loss = function(input, target, **options)
    assert loss.dtype == input.dtype
    torch.testing.assert_close(
        loss.double(), expected, equal_nan=True, **scaled(input.dtype, expected, magnitude)
    )
    upstream = torch.rand_like(expected).to(input.dtype) + 0.5
    if "fused" in str(function):
        upstream = torch.ones_like(upstream)  # another one rounds the gradient a second time
    for tensor, exact in ((input, x), (target, t)):
        if not tensor.requires_grad:
            continue
        (wanted,) = torch.autograd.grad(expected, exact, upstream.double(), retain_graph=True)
        (got,) = torch.autograd.grad(loss, tensor, upstream, retain_graph=True)
        assert got.dtype == tensor.dtype
        torch.testing.assert_close(
            got.double(), wanted, equal_nan=True, **scaled(input.dtype, wanted)
        )


def scaled(dtype: torch.dtype, values: Tensor, least: float = 1.0) -> dict[str, float]:
    """Tolerances for values that are sums of terms as large as the largest of them, or `least`."""
    tolerance = TOLERANCES[dtype]
    largest = values.detach().abs().nan_to_num(1.0, 1.0).max().item() if values.numel() else 1.0
    return {"rtol": tolerance["rtol"], "atol": tolerance["atol"] * max(largest, least)}


class Ours:
    """cross_entropy in one of its modes."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, input: Tensor, target: Tensor, **options: object) -> Tensor:
        return pyvizllm.cross_entropy(input, target, **options, **MODES[self.mode])

    def __str__(self) -> str:
        return self.mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_torchs_tests(dtype, mode, device):
    samples = list(
        OPERATIONS["nn.functional.cross_entropy"].sample_inputs(device, dtype, requires_grad=True)
    )
    assert len(samples) >= 20
    for sample in samples:
        same_as_torch(Ours(mode), sample.input, *sample.args, sample.kwargs)


def nll_loss_of_log_softmax(input: Tensor, target: Tensor, **options: object) -> Tensor:
    return F.nll_loss(input.log_softmax(0 if input.dim() == 1 else 1), target, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_torchs_nll_loss(dtype, mode, device):
    samples = list(
        OPERATIONS["nn.functional.nll_loss"].sample_inputs(device, dtype, requires_grad=True)
    )
    assert len(samples) >= 60
    for sample in samples:
        same_as_torch(
            Ours(mode), sample.input, *sample.args, sample.kwargs, nll_loss_of_log_softmax
        )


def module_inputs(device: str, dtype: torch.dtype) -> Iterator:
    inputs = MODULE.module_inputs_func(MODULE, device, dtype, requires_grad=True, training=True)
    assert len(inputs) >= 100
    yield from inputs


def exact_options(options: dict[str, object]) -> dict[str, object]:
    return {name: wide(value) for name, value in options.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_torchs_module(dtype, device):
    for sample in module_inputs(device, dtype):
        options = sample.constructor_input.kwargs
        exact = nn.CrossEntropyLoss(**exact_options(options))
        ours = pyvizllm.CrossEntropyLoss(**options).to(device)
        input, target = sample.forward_input.args
        if target.requires_grad and not target.is_leaf:  # the softmax of a leaf
            target = target.detach().requires_grad_()
        magnitude = 1.0
        if exact.reduction != "none":  # class weights of the samples are of either sign
            terms = nn.CrossEntropyLoss(**{**exact_options(options), "reduction": "none"})
            losses = terms(wide(input), wide(target))
            shrunk = exact(wide(input), wide(target)) / losses.sum()  # by what the mean divides
            magnitude = max(1.0, (losses.abs().sum() * shrunk.abs()).item())
        same_as_torch(ours, input, target, {}, exact, magnitude)


@pytest.mark.parametrize("of", [nn.CrossEntropyLoss, nn.NLLLoss], ids=lambda of: of.__name__)
@pytest.mark.parametrize("module", [pyvizllm.CrossEntropyLoss, nn.CrossEntropyLoss])
def test_error_inputs_of_torchs_modules(module, of, device, monkeypatch):
    (info,) = (info for info in module_db if info.module_cls is of)
    if info.module_error_inputs_func is None:
        pytest.skip(f"expected a torch that has error inputs of {of.__name__} (2.13 has)")
    monkeypatch.setattr(F, "cross_entropy", pyvizllm.cross_entropy)
    errors = info.module_error_inputs_func(
        info, device, torch.float32, requires_grad=False, training=True
    )
    assert len(errors) >= {nn.CrossEntropyLoss: 7, nn.NLLLoss: 1}[of]
    for error in errors:
        assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
        sample = error.module_error_input
        loss = module(**sample.constructor_input.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            loss(*sample.forward_input.args)


X = torch.linspace(-2, 2, 20).view(4, 5)
T = torch.tensor([0, 1, 2, 3])
VOLUME = torch.linspace(-2, 2, 180).view(2, 3, 5, 6)

# What torch refuses, and what it takes though it looks odd.
ODD_CALLS = {
    "too few targets": ((X, T[:3]), {}),
    "too few targets, probabilities": ((X, X[:3]), {}),
    "a column of targets": ((X, T[:, None]), {}),
    "one target for a batch": ((X, T[0]), {}),
    "no classes in the batch of one": ((X[:1], T[0]), {}),
    "one token, two targets": ((X[0], T[:2]), {}),
    "one token, a matrix of targets": ((X[0], T.view(2, 2)), {}),
    "one token, one target in a batch": ((X[0], T[2:3]), {"reduction": "none"}),
    "one class, target of its shape": ((X[0, :1], T[:1]), {}),
    "one class": ((X[0, :1], T[0]), {}),
    "scalars": ((X[0, 0], X[0, 0]), {}),
    "scalar and index": ((X[0, 0], T[0]), {}),
    "a plane short": ((VOLUME, torch.zeros(2, 5, dtype=torch.int64)), {}),
    "a plane too wide": ((VOLUME, torch.zeros(2, 5, 7, dtype=torch.int64)), {}),
    "another batch of planes": ((VOLUME, torch.zeros(3, 5, 6, dtype=torch.int64)), {}),
    "integer logits": ((X.long(), T), {}),
    "boolean logits": ((X.bool(), T), {}),
    "complex logits": ((X.cfloat(), T), {}),
    "complex probabilities": ((X, X.cfloat()), {}),
    "integer probabilities": ((X, X.long()), {}),
    "boolean targets": ((X, T.bool()), {}),
    "int16 targets": ((X, T.short()), {}),
    "uint8 targets": ((X, T.byte()), {}),
    "float targets": ((X, T.float()), {}),
    "target too large": ((X, T + 2), {}),
    "negative target": ((X, T - 1), {}),
    "target too large, all weights 0": ((X, T + 2), {"weight": torch.zeros(5)}),
    "ignored out of range": ((X, T + 2), {"ignore_index": 5}),
    "huge ignore_index": ((X, T), {"ignore_index": 2**40}),
    "ignore_index of numpy": ((X, T), {"ignore_index": np.int64(1)}),
    "ignore_index as a tensor": ((X, T), {"ignore_index": torch.tensor(1)}),
    "ignore_index 1.5": ((X, T), {"ignore_index": 1.5}),
    "ignore_index True": ((X, T), {"ignore_index": True}),
    "ignore_index with probabilities": ((X, X), {"ignore_index": 1}),
    "negative ignore_index with probabilities": ((X, X), {"ignore_index": -1}),
    "reduction avg": ((X, T), {"reduction": "avg"}),
    "reduction None": ((X, T), {"reduction": None}),
    "reduction of old": ((X, T), {"reduction": "elementwise_mean"}),
    "smoothing 1.5": ((X, T), {"label_smoothing": 1.5}),
    "smoothing 1.5 of probabilities": ((X, X), {"label_smoothing": 1.5}),
    "smoothing 1": ((X, T), {"label_smoothing": 1}),
    "too few weights": ((X, T), {"weight": torch.ones(4)}),
    "a matrix of weights": ((X, T), {"weight": torch.ones(5, 1)}),
    "a scalar weight": ((X, T), {"weight": torch.ones(())}),
    "a list of weights": ((X, T), {"weight": [1.0] * 5}),
    "one weight of probabilities": ((X, X), {"weight": torch.ones(1)}),
    "float64 weights": ((X, T), {"weight": torch.ones(5).double()}),
    "integer weights": ((X, T), {"weight": torch.ones(5).long()}),
    "float32 weights of bfloat16": ((X.bfloat16(), T), {"weight": torch.ones(5)}),
    "weights that require grad": ((X, T), {"weight": torch.ones(5).requires_grad_()}),
    "all weights 0": ((X, T), {"weight": torch.zeros(5)}),
    "negative weights": ((X, T), {"weight": -torch.arange(1.0, 6)}),
    "integer weights of probabilities": ((X, X), {"weight": torch.arange(5)}),
    "float64 weights of probabilities": ((X, X), {"weight": torch.arange(5).double()}),
    "infinite weight of a class that never is": (
        (X, T % 2),
        {"weight": torch.tensor([1.0, 1.0, 1.0, torch.inf, 1.0])},
    ),
    "NaN in a row of weight 0": (
        (X.where(torch.arange(5) != 2, torch.nan), T * 0),
        {"weight": torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]), "reduction": "sum"},
    ),
    "all ignored, smoothing": ((X, T * 0 - 100), {"label_smoothing": 0.1}),
    "no tokens": ((X[:0], T[:0]), {}),
    "no tokens, sum": ((X[:0], T[:0]), {"reduction": "sum"}),
    "no tokens, none": ((X[:0], T[:0]), {"reduction": "none"}),
    "no tokens, probabilities": ((X[:0], X[:0]), {}),
    "no tokens, sum of probabilities": ((X[:0], X[:0]), {"reduction": "sum"}),
    "no tokens, classes two apart": ((X[:0, ::2], T[:0]), {}),
    "no tokens, probabilities two apart": ((X[:0, ::2], X[:0, ::2]), {}),
    "no places": ((VOLUME[..., :0], torch.zeros(2, 5, 0, dtype=torch.int64)), {}),
    "no batch": ((VOLUME[:0], torch.zeros(0, 5, 6, dtype=torch.int64)), {}),
    "no classes": ((X[:, :0], T), {}),
    "no classes, sum of probabilities": ((X[:, :0], X[:, :0]), {"reduction": "sum"}),
    "no classes, probabilities": ((X[:, :0], X[:, :0]), {"reduction": "none"}),
    "no classes, all ignored": ((X[:, :0], T * 0 - 100), {"reduction": "sum"}),
    "no classes and no tokens": ((X[:0, :0], T[:0]), {}),
    "a list": (([1.0], T), {}),
    "a number for a target": ((X, 3), {}),
    "no target": ((X, None), {}),
    "sparse logits": ((X.to_sparse(), T), {}),
    "sparse targets": ((X, T.to_sparse()), {}),
    "target elsewhere": ((X, T.to("meta")), {}),
    "weights elsewhere": ((X, T), {"weight": torch.ones(5, device="meta")}),
}


@pytest.mark.parametrize("call", ODD_CALLS)
@pytest.mark.filterwarnings("ignore:reduction='elementwise_mean' is deprecated")
def test_odd_calls_do_as_torch(call):
    """The same result and dtype, or an error of the same type (or of one derived from it)."""
    arguments, options = ODD_CALLS[call]
    try:
        expected = torch_cross_entropy(*arguments, **options)
    except Exception as error:
        # NotImplementedError is a RuntimeError: which of the two depends on the place it is found.
        kind = RuntimeError if isinstance(error, NotImplementedError) else type(error)
        with pytest.raises(kind, match=r"cross_entropy: |index .* is out of bounds"):
            pyvizllm.cross_entropy(*arguments, **options)
        return
    loss = pyvizllm.cross_entropy(*arguments, **options)
    tolerance = {} if loss.dtype != torch.bfloat16 else {"rtol": 2.0**-6, "atol": 0.0}
    torch.testing.assert_close(loss, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1e30], [0.0, 1.0, 1.0]], ids=["huge", "zero"])
def test_gradient_where_a_weight_is_odd(weights, smoothing):
    """A huge one of a class that never is; none of a target that is improbable."""
    x = torch.tensor([[-60.0, 0.0, 1.0], [2.0, 1.0, -1.0]])
    gradients = []
    for loss in (torch_cross_entropy, pyvizllm.cross_entropy):
        leaf = x.clone().double() if loss is torch_cross_entropy else x.clone()
        weight = torch.tensor(weights, dtype=leaf.dtype)
        leaf.requires_grad_()
        options = {"reduction": "sum", "label_smoothing": smoothing}
        loss(leaf, torch.tensor([0, 1]), weight, **options).backward()
        gradients.append(leaf.grad.float())
    wanted, got = gradients
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(got[0, 0], wanted[0, 0], rtol=1e-5, atol=0)  # 1.6e-28


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probabilities", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("weight", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_are_torchs(dtype, weight, probabilities, autocast, device):
    """Of the loss and the gradient, for all mixtures, or a RuntimeError where torch has one."""
    x = X.to(device, dtype).requires_grad_()
    target = T.to(device) if probabilities is None else X.to(device, probabilities).softmax(1)
    weights = None if weight is None else torch.arange(1, 6).to(device, weight)
    exact = torch_cross_entropy(
        x.detach().double(),
        target.double() if probabilities else target,
        None if weights is None else weights.double(),
    )
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        try:
            expected = torch_cross_entropy(x, target, weights)
        except RuntimeError:
            with pytest.raises(RuntimeError, match=r"scalar type \w+ but found \w+ \(weight"):
                pyvizllm.cross_entropy(x, target, weights)
            return
        loss = pyvizllm.cross_entropy(x, target, weights)
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(
        loss.double(), exact, rtol=TOLERANCES[loss.dtype]["rtol"] + 1e-15, atol=0.0
    )
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.dtype == x.dtype


def test_assigned_over_torchs(monkeypatch, device):
    """A script that knows nothing of us, and the modules it uses."""
    x = torch.randn(6, 5, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, -100], device=device)
    weight = torch.rand(5, device=device)
    expected = torch_cross_entropy(x, target, weight, label_smoothing=0.1)
    (wanted,) = torch.autograd.grad(expected, x)
    calls = []

    def spy(*arguments: Tensor, **options: object) -> Tensor:
        calls.append(options)
        return pyvizllm.cross_entropy(*arguments, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    assert torch.nn.functional.cross_entropy is spy
    loss = nn.CrossEntropyLoss(weight, label_smoothing=0.1)(x, target)
    assert len(calls) == 1
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)
    # And our own does not call what it was assigned over, in any of its ways.
    pyvizllm.cross_entropy(x, torch.rand(6, 5, device=device, requires_grad=True)).backward()
    (first,) = torch.autograd.grad(pyvizllm.cross_entropy(x, target), x, create_graph=True)
    first.sum().backward()
    assert len(calls) == 1


def test_legacy_arguments_by_position_are_refused():
    """Size_average stands where ignore_index does, ignore_index where reduction does."""
    for arguments in ((None,), (True,), (None, -100)):
        with pytest.raises(TypeError, match=r"size_average and reduce .* pass what follows weight"):
            pyvizllm.cross_entropy(X, T, None, *arguments)
    with pytest.raises(TypeError, match="positional arguments"):
        pyvizllm.cross_entropy(X, T, None, None, -100, None, "mean", 0.1)


def test_deterministic_mode(device):
    x = torch.randn(2, 5, 3, device=device, requires_grad=True)
    index = torch.randint(5, (2, 3), device=device)
    torch.use_deterministic_algorithms(True)
    try:
        for target in (index, x.detach().softmax(1)):
            for options in MODES.values():
                pyvizllm.cross_entropy(x, target, **options).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = torch_cross_entropy(x, index) + torch_cross_entropy(x, x.detach().softmax(1))
    torch.testing.assert_close(x.grad, 2 * torch.autograd.grad(expected, x)[0])


def test_module_keeps_torchs_state_and_says_what_it_is():
    weight = torch.rand(5)
    theirs = nn.CrossEntropyLoss(weight, reduction="sum")
    ours = pyvizllm.CrossEntropyLoss(torch.zeros(5), reduction="sum", z_loss=0.5, fused=True)
    assert isinstance(ours, nn.CrossEntropyLoss)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"weight"}
    expected = theirs(X, T) + 0.5 * (weight[T] * X.logsumexp(1) ** 2).sum()
    torch.testing.assert_close(ours(X, T), expected)
    assert repr(ours) == ("CrossEntropyLoss(weight=[5], reduction='sum', z_loss=0.5, fused=True)")
    assert repr(pyvizllm.CrossEntropyLoss()) == "CrossEntropyLoss()"
    assert ours.double().weight.dtype == torch.float64
    loss, metrics = pyvizllm.CrossEntropyLoss(return_metrics=True)(X, T)
    assert loss == pyvizllm.cross_entropy(X, T)
    assert metrics.tokens == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its old arguments
        assert pyvizllm.CrossEntropyLoss(size_average=False).reduction == "sum"


class Overriding(torch.Tensor):
    """A tensor that has its own say in torch's cross_entropy."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch_cross_entropy:
            return f"torch's with {sorted(kwargs)}"
        if function is pyvizllm.cross_entropy:
            return f"ours with z_loss {kwargs['z_loss']}"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_that_override_torchs_function_do_so_here(monkeypatch):
    x = torch.randn(4, 5).as_subclass(Overriding)
    words = "torch's with ['ignore_index', 'label_smoothing', 'reduction']"
    assert pyvizllm.cross_entropy(x, T[:4], fused=True) == words
    assert pyvizllm.cross_entropy(x, T[:4], z_loss=0.5) == "ours with z_loss 0.5"
    monkeypatch.setattr(F, "cross_entropy", pyvizllm.cross_entropy)
    assert F.cross_entropy(x, T[:4]) == words


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_without_values(dtype):
    x = torch.empty(4, 5, dtype=dtype, device="meta", requires_grad=True)
    target = torch.empty(4, dtype=torch.int64, device="meta")
    for function in (torch_cross_entropy, pyvizllm.cross_entropy):
        loss = function(x, target, reduction="none")
        assert (loss.shape, loss.dtype, loss.device.type) == ((4,), dtype, "meta")
    weight = torch.empty(7, 5, dtype=dtype, device="meta")
    loss = pyvizllm.linear_cross_entropy(x, weight, target)
    assert (loss.shape, loss.dtype, loss.device.type) == ((), dtype, "meta")


@pytest.mark.parametrize("name", ["z_loss", "softcap", "logit_scale"])
def test_numbers_that_are_tensors_would_lose_their_gradient(name):
    value = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(TypeError, match=f"cross_entropy: expected {name} to be a number, got a"):
        pyvizllm.cross_entropy(X, T, **{name: value})


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_places_of_any_size(strict):
    class Loss(nn.Module):
        def forward(self, x, target):
            return pyvizllm.cross_entropy(x, target)

    x, target = torch.randn(3, 5, 7), torch.randint(5, (3, 7))
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = ({0: batch, 2: length}, {0: batch, 1: length})
    program = torch.export.export(Loss(), (x, target), dynamic_shapes=shapes, strict=strict)
    x, target = torch.randn(4, 5, 9), torch.randint(5, (4, 9))
    torch.testing.assert_close(program.module()(x, target), torch_cross_entropy(x, target))
