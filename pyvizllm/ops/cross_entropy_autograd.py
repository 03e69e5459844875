"""Autograd and fake kernels of the cross_entropy operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.cross_entropy_composition import composed_gradient
from pyvizllm.ops.dtypes import wide_dtype
from pyvizllm.ops.metrics import RECORD_SIZE, CrossEntropyMetrics

_ops = torch.ops.pyvizllm
INPUTS = 11  # of the operators: input, target, weight, seven options, and what is wanted

# -- Recompute mode --------------------------------------------------------------------------------


def _setup_recompute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, weight, *options, _ = inputs
    _, row_max, row_sum, sums, records = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, row_sum, sums, records)
    ctx.save_for_backward(input, target, weight, row_max, row_sum)
    ctx.options = options


def _recompute_gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    saved = input, target, weight, *_ = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return composed_gradient(grad_loss, input, target, weight, *ctx.options)
    operator = _ops.cross_entropy_backward.default
    return call_kernel(operator, (grad_loss, *saved, *ctx.options))


def _recompute_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grad = None if grad_loss is None else _recompute_gradient(ctx, grad_loss)
    return (grad, *[None] * (INPUTS - 1))


torch.library.register_autograd(
    "pyvizllm::cross_entropy_forward", _recompute_backward, setup_context=_setup_recompute
)


class Recompute(torch.autograd.Function):
    """The operator with its formula, in less time than the dispatcher takes to find that.

    Only the loss is returned, of `dtype`: autograd wraps all that is. The rest, `sums` and
    `records`, is added to the list `noted`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: tuple[Any, ...],
        dtype: torch.dtype,
        noted: list[Tensor],
    ) -> Tensor:
        operator = _ops.cross_entropy_forward.default
        loss, *state, sums, records = call_kernel(operator, (input, target, weight, *options))
        noted += sums, records
        ctx.save_for_backward(input, target, weight, *state)
        ctx.options = options[:-1]
        ctx.upstream_dtype = loss.dtype
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad = _recompute_gradient(ctx, grad_loss.to(ctx.upstream_dtype))
        return grad, None, None, None, None, None


class FewLogits(torch.autograd.Function):
    """As Recompute, where a call costs more than the arithmetic: on the CPU, not by row.

    The gradient for an upstream one of 1 is computed at once; for any other the logits are read
    again, so that it too is rounded once.
    """

    MOST = 2**14
    """Elements."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: tuple[Any, ...],
        dtype: torch.dtype,
        noted: list[Tensor],
    ) -> Tensor:
        operator = _ops.cross_entropy_fused.default
        loss, grad, sums, records = call_kernel(operator, (input, target, weight, *options))
        noted += sums, records
        ctx.save_for_backward(input, target, weight, grad)
        ctx.options = options[:-1]
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, grad = ctx.saved_tensors
        upstream = grad_loss.to(wide_dtype(grad.dtype))  # the kernel's loss
        if torch.is_grad_enabled():  # create_graph=True
            grad = composed_gradient(upstream, *inputs, *ctx.options)
        elif is_one(upstream):
            grad = unshared([grad])[0]
        else:
            operator = _ops.cross_entropy_forward.default
            _, *state, _, _ = call_kernel(operator, (*inputs, *ctx.options, 0))
            operator = _ops.cross_entropy_backward.default
            grad = call_kernel(operator, (upstream, *inputs, *state, *ctx.options))
        return grad, None, None, None, None, None


def call_kernel(operator: Any, inputs: tuple[Any, ...]) -> Any:
    """Calls an operator of which no derivative is wanted, without asking for it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


# -- Fused mode ------------------------------------------------------------------------------------


def is_one(upstream: Tensor) -> bool:
    """Whether an upstream gradient is the number 1, where it costs nothing to know: on the CPU.

    A call less: of few rows that is a fifth of the backward.
    """
    if _is_no_memory(upstream) or torch._C._len_torch_dispatch_stack() > 0:
        return False
    on_host = upstream.is_cpu and upstream.dim() == 0
    return on_host and upstream.item() == 1  # of the CPU


def _is_no_memory(tensor: Tensor) -> bool:
    """Whether it stands for others: for what a graph is traced of, for a batch of vmap's."""
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is not Tensor or batched


def unshared(grads: list[Tensor]) -> list[Tensor]:
    """Gradients that were saved, for whoever may add to them or change them.

    Over a retained graph they are needed again as they are.
    """
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return [grad.clone() for grad in grads]
    return grads


def scaled(grads: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Applies an upstream gradient, [] or one that broadcasts, to gradients computed for one of 1.

    In place: the upstream of a training step is 1, and then the device touches nothing.
    """
    if _is_no_memory(upstream):
        return [(grad * upstream).to(grad.dtype) for grad in grads]
    grads = unshared(grads)
    if is_one(upstream):
        return grads
    if upstream.dim() == 0:
        _ops.scale_(grads, upstream.double())
        torch.autograd.graph.increment_version(grads)
    else:
        for grad in grads:
            grad.mul_(upstream)
    return grads


def _scaled_rows(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """The gradient of logits for upstream gradients [] or [rows]."""
    if torch.is_grad_enabled():  # create_graph=True: a detached gradient would be silently wrong
        raise RuntimeError(
            "cross_entropy: fused=True has no second derivative; use fused=False with create_graph"
        )
    if grad_loss.dim() > 0:  # of each row, or each position of [batch, classes, positions]
        grad_loss = grad_loss.reshape(grad.shape[0], 1, *grad.shape[2:])
    return scaled([grad], grad_loss)[0]


class Fused(torch.autograd.Function):
    """The gradient of the logits is a result of the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: tuple[Any, ...],
        dtype: torch.dtype,
        noted: list[Tensor],
    ) -> Tensor:
        operator = _ops.cross_entropy_fused.default
        loss, grad, sums, records = call_kernel(operator, (input, target, weight, *options))
        noted += sums, records
        ctx.save_for_backward(grad)
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return _scaled_rows(grad, grad_loss), None, None, None, None, None


class FusedInplace(torch.autograd.Function):
    """Fused mode with the gradient written over the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: tuple[Any, ...],
        dtype: torch.dtype,
        noted: list[Tensor],
    ) -> Tensor:
        operator = _ops.cross_entropy_fused_.default
        loss, sums, records = call_kernel(operator, (input, target, weight, *options))
        # Whoever saved the logits for its own backward now finds them changed, and raises.
        torch.autograd.graph.increment_version(input)
        noted += sums, records
        ctx.save_for_backward(input)
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return _scaled_rows(grad.detach(), grad_loss), None, None, None, None, None


# -- Fake kernels ----------------------------------------------------------------------------------


def _fake_loss(input: Tensor, reduction: str) -> Tensor:
    shape = (_rows(input),) if reduction == "none" else ()
    return input.new_empty(shape, dtype=wide_dtype(input.dtype))


def _rows(input: Tensor) -> int:
    """Of [rows, classes], or of [batch, classes, positions]."""
    return input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[2]


def _fake_wanted(input: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    rows = _rows(input) if wanted > 1 else 0
    return (
        input.new_empty((CrossEntropyMetrics.SIZE if wanted > 0 else 0,), dtype=torch.float64),
        input.new_empty((RECORD_SIZE, rows), dtype=torch.float64),
    )


@torch.library.register_fake("pyvizllm::cross_entropy_forward")
def _(input, target, weight, *options):  # type: ignore[no-untyped-def]
    *_, reduction, wanted = options
    row = _fake_loss(input, "none")
    row_sum = torch.empty_like(row, dtype=torch.float64)
    return _fake_loss(input, reduction), row, row_sum, *_fake_wanted(input, wanted)


@torch.library.register_fake("pyvizllm::cross_entropy_backward")
def _(grad_loss, input, *_):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape)


@torch.library.register_fake("pyvizllm::cross_entropy_fused")
def _(input, target, weight, *options):  # type: ignore[no-untyped-def]
    *_, reduction, wanted = options
    grad = input.new_empty(input.shape)
    return _fake_loss(input, reduction), grad, *_fake_wanted(input, wanted)


@torch.library.register_fake("pyvizllm::cross_entropy_fused_")
def _(input, target, weight, *options):  # type: ignore[no-untyped-def]
    *_, reduction, wanted = options
    return _fake_loss(input, reduction), *_fake_wanted(input, wanted)
