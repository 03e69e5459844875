"""cross_entropy differentiated twice, forwards, under torch.func, autocast and torch.compile.

Three to five tokens of six classes: gradcheck's Jacobians are dense, and every token can be of
another sort (ordinary, ignored, the first and the last class).
"""

from __future__ import annotations

import io
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pyvizllm.ops import cross_entropy, linear_cross_entropy

OPTIONS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": -0.7},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 2.0, "logit_scale": 1.5},
}
REDUCTIONS = ("none", "mean", "sum")
# torch's own first use of forward-mode compiles its decompositions with a deprecated function.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(23)


def problem(kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, targets and class weights in float64."""
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, generator=generator, dtype=torch.float64)
    if kind.endswith("indices"):
        target = torch.tensor([1, -100, 5, 0])
    else:
        target = torch.rand(4, 6, generator=generator, dtype=torch.float64)
        target[0, 2] = 0
    return x, target, weight if kind.startswith("weighted") else None


KINDS = ("indices", "weighted indices", "probabilities", "weighted probabilities")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivative(kind, options, generator):
    x, target, weight = problem(kind, generator)
    for reduction in REDUCTIONS:

        def loss(x: Tensor, reduction: str = reduction) -> Tensor:
            return cross_entropy(x, target, weight, reduction=reduction, **OPTIONS[options])

        assert torch.autograd.gradcheck(loss, (x,), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, (x,))


@pytest.mark.parametrize("options", OPTIONS)
def test_derivatives_of_probabilities_and_class_weights(options, generator):
    x, target, weight = problem("weighted probabilities", generator)
    inputs = (x, target.requires_grad_(), weight.requires_grad_())
    for reduction in REDUCTIONS:

        def loss(*inputs: Tensor, reduction: str = reduction) -> Tensor:
            return cross_entropy(*inputs, reduction=reduction, **OPTIONS[options])

        assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind, generator):
    x, target, weight = problem(kind, generator)
    for options in OPTIONS.values():

        def loss(x: Tensor, options: dict = options) -> Tensor:
            return cross_entropy(x, target, weight, **options)

        assert torch.autograd.gradcheck(
            loss,
            (x,),
            check_forward_ad=True,
            check_backward_ad=False,
            check_batched_forward_grad=True,
        )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        loss, metrics = cross_entropy(dual, target, weight, return_metrics=True)
        assert forward_ad.unpack_dual(loss).tangent.abs() < 1e-14  # a constant changes no softmax
        _, expected = cross_entropy(x, target, weight, return_metrics=True)
        torch.testing.assert_close(metrics.sums, expected.sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [{}, {"fused": True}], ids=["recompute", "fused"])
def test_transforms_of_torch_func(kind, mode, generator):
    x, target, weight = problem(kind, generator)
    x = x.detach()

    def ours(x: Tensor, target: Tensor = target, **options: object) -> Tensor:
        return cross_entropy(x, target, weight, **options, **mode)

    def theirs(x: Tensor, target: Tensor = target, **options: object) -> Tensor:
        return F.cross_entropy(x, target, weight, **options)

    func = torch.func
    tangent = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    batch = torch.randn((3, *x.shape), generator=generator, dtype=x.dtype)
    targets = torch.stack([target, target.roll(1, 0), target.roll(2, 0)])
    for transformed in (
        func.grad,
        func.jacrev,
        func.jacfwd,
        func.hessian,
        lambda f: func.jacrev(lambda x: f(x, reduction="none")),
        lambda f: lambda x: func.jvp(f, (x,), (tangent,)),
        lambda f: lambda x: func.vjp(f, x)[1](torch.ones((), dtype=x.dtype)),
        lambda f: lambda x: func.vmap(f)(batch),
        lambda f: lambda x: func.vmap(f, in_dims=(0, 0))(batch, targets),
        lambda f: lambda x: func.vmap(func.grad(f))(batch, targets),
        lambda f: lambda x: func.vmap(f)(x, target),  # one token at a time
    ):
        torch.testing.assert_close(transformed(ours)(x), transformed(theirs)(x), equal_nan=True)


def test_metrics_of_models_side_by_side(generator):
    """As those of one model after the other."""
    batch = torch.randn(3, 4, 6, generator=generator)
    target = torch.tensor([1, -100, 5, 0])

    def sums(x: Tensor) -> tuple[Tensor, Tensor]:
        _, metrics = cross_entropy(x, target, return_metrics="per_token")
        return metrics.sums, metrics.per_token.rank

    got, ranks = torch.func.vmap(sums)(batch)
    for index, x in enumerate(batch):
        expected, rank = sums(x)
        torch.testing.assert_close(got[index], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(ranks[index], rank)


def test_out_of_bounds_inside_a_transform_is_an_index_error():
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        torch.func.grad(cross_entropy)(torch.zeros(2, 5), torch.tensor([0, 9]))


@pytest.mark.parametrize("mode", [{}, {"fused": True}], ids=["recompute", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_for_all_batches(kind, mode, generator):
    """Two graphs: of the first batch, and of a batch of any size, when a second size is seen."""
    torch._dynamo.reset()
    _, _, weight = problem(kind, generator)
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(x * 2.0, target, weight, label_smoothing=0.1, **mode)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (4, 7, 9, 5, 31, 2):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        target = torch.randint(6, (rows,), generator=generator)
        if kind.endswith("probabilities"):
            target = torch.rand(rows, 6, generator=generator, dtype=torch.float64)
        loss = compiled(x, target)
        (gradient,) = torch.autograd.grad(loss, x)
        expected = F.cross_entropy(x * 2.0, target, weight, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])
    assert counter.frame_count == 2


def test_compiles_with_places_metrics_and_autocast(generator):
    torch._dynamo.reset()

    def step(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = cross_entropy(x * 2, target, z_loss=0.1, return_metrics="per_token")
        return loss, metrics.sums, metrics.per_token.loss, metrics.per_token.rank

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 6, 2, generator=generator).bfloat16().requires_grad_()
        target = torch.randint(6, (rows, 2), generator=generator)
        results = compiled(x, target)
        assert results[0].dtype == torch.float32
        for got, expected in zip(results, step(x, target), strict=True):
            torch.testing.assert_close(got, expected)
        (gradient,) = torch.autograd.grad(results[0], x)
        torch.testing.assert_close(gradient, torch.autograd.grad(step(x, target)[0], x)[0])


def test_compiles_a_transform(generator):
    torch._dynamo.reset()
    x = torch.randn(4, 6, generator=generator)
    target = torch.tensor([1, -100, 5, 0])
    compiled = torch.compile(torch.func.grad(cross_entropy), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), torch.func.grad(F.cross_entropy)(x, target))


OPERATORS = {
    "default": ("cross_entropy_forward", cross_entropy),
    "fused": ("cross_entropy_forward", partial(cross_entropy, fused=True)),
    "linear": ("linear_cross_entropy", lambda x, target: linear_cross_entropy(x, x, target)),
}


@pytest.mark.parametrize("mode", OPERATORS)
def test_compiles_to_our_operators(mode, generator):
    """The composition has the same results: it is not to be what is compiled."""
    operator, function = OPERATORS[mode]
    torch._dynamo.reset()
    called = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    x = torch.randn(6, 6, generator=generator, requires_grad=True)
    target = torch.randint(6, (6,), generator=generator)
    torch.testing.assert_close(compiled(x, target), function(x, target))
    assert [name for name in called if name.startswith("pyvizllm.")] in (
        [f"pyvizllm.{operator}"],
        [f"pyvizllm.{operator}.default"],
    )
    assert not [name for name in called if "log_softmax" in name]


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_no_positions(dynamic, generator):
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for positions in (5, 3, 0):
        x = torch.randn(2, 6, positions, generator=generator, requires_grad=True)
        target = torch.randint(6, (2, positions), generator=generator)
        loss = compiled(x, target, reduction="sum")
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction="sum"))
        assert torch.autograd.grad(loss, x)[0].shape == x.shape


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_graph_of_the_gradient_leaves_hooks_alone(generator):
    """A retained gradient is there once, and a hook changes the gradient once."""
    x, target, _ = problem("indices", generator)
    gradients = []
    for function in (cross_entropy, F.cross_entropy):
        logits = x * 1
        logits.retain_grad()
        logits.register_hook(lambda gradient: gradient * 3)
        (gradient,) = torch.autograd.grad(function(logits, target), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)
        gradients += [gradient, second]
        function(logits, target).backward(create_graph=True)
        gradients.append(logits.grad)
    for ours, theirs in zip(gradients[:3], gradients[3:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_a_traced_backward_asks_for_no_number(fused, generator):
    """make_fx runs it once, on real tensors: the graph is for any loss that follows."""
    x, other = torch.randn(2, 6, 5, generator=generator)
    target = torch.randint(5, (6,), generator=generator)

    def gradient(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(leaf, target, fused=fused)
        return torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(make_fx(gradient)(x)(other), gradient(other))


def test_traced_by_torch_jit(generator):
    x = torch.randn(4, 6, generator=generator, requires_grad=True)
    target = torch.tensor([1, -100, 5, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit as a whole
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of our checks of shapes
        traced = torch.jit.trace(lambda x, t: cross_entropy(x * 2, t, fused=True), (x, target))
        saved = io.BytesIO()
        torch.jit.save(traced, saved)
        loaded = torch.jit.load(io.BytesIO(saved.getvalue()))
    loss, expected = loaded(x, target), F.cross_entropy(x * 2, target)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, x)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_of_our_loss_and_of_nothing_where_the_weight_is_0(generator):
    """0 times Inf is 0 in the composition as in the kernels: what has no weight has no part."""
    x, target, _ = problem("indices", generator)
    x = x.detach().clone()
    x[0, target[0]] = -torch.inf
    weight = torch.ones(6, dtype=torch.float64)
    weight[target[0]] = 0
    for options in ({"weight": weight}, {"label_smoothing": 1.0}):
        loss = cross_entropy(x, target, reduction="sum", **options)
        composed = torch.func.vmap(partial(cross_entropy, reduction="sum", **options))
        torch.testing.assert_close(composed(x[None], target[None])[0], loss)
        assert not loss.isnan()
