"""The operators of linear_cross_entropy, in Python: eager and compiled code call the same ones.

`linear_cross_entropy` returns the gradients beside the loss, for an upstream gradient of 1: with a
loss that is a scalar that is all its backward needs. With one loss a token the upstream is only
known in the backward, where `linear_cross_entropy_backward` computes the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.cross_entropy_arguments import Reduction
from pyvizllm.ops.cross_entropy_autograd import scaled
from pyvizllm.ops.dtypes import wide_dtype
from pyvizllm.ops.linear_cross_entropy_chunks import (
    Linear,
    Loss,
    Targets,
    loss_and_gradients,
)
from pyvizllm.ops.linear_cross_entropy_gradients import Gradients, gradient_dtype
from pyvizllm.ops.metrics import RECORD_SIZE, CrossEntropyMetrics

INPUTS = 15  # of the operator


def _run(
    linear: Linear,
    targets: Targets,
    reduction: str,
    chunk_size: int | None,
    needs: Sequence[bool],
    grad_loss: Tensor | None = None,
) -> tuple[Loss, Gradients]:
    # The products here have the dtypes they should have; those of the caller's autocast are done.
    with torch.autocast(linear.input.device.type, enabled=False):
        return loss_and_gradients(linear, targets, reduction, chunk_size, needs, grad_loss)


@torch.library.custom_op("pyvizllm::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    reduction: str,
    wanted: int,
    chunk_size: int | None,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, records, and gradients of input, weight and bias."""
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    found, grads = _run(
        Linear(input, weight, bias, dtype),
        Targets(target, class_weight, options, wanted),
        reduction,
        chunk_size,
        [False] * 3 if reduction == "none" else needs,
    )
    return found.loss, found.sums, found.records, grads.input, grads.weight, grads.bias


@torch.library.custom_op("pyvizllm::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk_size: int | None,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias for the upstream gradients [tokens]."""
    _, grads = _run(
        Linear(input, weight, bias, dtype),
        Targets(
            target, class_weight, (ignore_index, label_smoothing, z_loss, softcap, logit_scale), 0
        ),
        "none",
        chunk_size,
        needs,
        grad_loss,
    )
    return grads.input, grads.weight, grads.bias


# -- Autograd --------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, target, bias, class_weight, *options = inputs
    _, sums, records, *grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, records, *grads)
    ctx.save_for_backward(input, weight, target, bias, class_weight, *grads)
    ctx.options = options


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * INPUTS
    *tensors, grad_input, grad_weight, grad_bias = ctx.saved_tensors
    *options, reduction, _, chunk_size, dtype, needs = ctx.options
    input, weight, _, bias, _ = tensors
    grads: Sequence[Tensor | None]
    if torch.is_grad_enabled():  # create_graph=True
        grads = _differentiable_gradients(grad_loss, tensors, options, reduction, dtype, needs)
    elif reduction == "none":
        grads = linear_cross_entropy_backward_op(
            grad_loss, *tensors, *options, chunk_size, dtype, needs
        )
    else:
        grads = scaled([grad_input, grad_weight, grad_bias], grad_loss)
    found = [
        gradient.to(like.dtype) if need and gradient is not None else None
        for gradient, like, need in zip(grads, (input, weight, bias), needs, strict=True)
    ]
    return (found[0], found[1], None, found[2], *[None] * (INPUTS - 4))


def _differentiable_gradients(
    grad_loss: Tensor,
    tensors: list[Any],
    options: list[Any],
    reduction: Reduction,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The same gradients by way of all logits at once, which can be differentiated again."""
    input, weight, target, bias, class_weight = tensors
    ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
    # Views, to which the gradients go and no further: not by way of an input that was made of the
    # weight. Hooks of the tensors themselves are for the whole gradient, too.
    layer: list[Any] = [None if t is None else t.view_as(t) for t in (input, weight, bias)]
    products: list[Any] = [None if t is None else t.to(dtype) for t in layer]
    logits = torch.nn.functional.linear(*products).to(wide_dtype(dtype))
    loss = cross_entropy(
        logits,
        target,
        None if class_weight is None else class_weight.to(logits.dtype),
        ignore_index,
        reduction,
        label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    wanted = [t for t, need in zip(layer, needs, strict=True) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad_loss.to(loss.dtype), create_graph=True))
    return [next(found) if need else None for need in needs]


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup)


# -- Fake kernels ----------------------------------------------------------------------------------


def _fake_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(dtype)
    shapes = (input.shape, weight.shape, weight.shape[:1])
    nothing = ((0,), (0, weight.shape[1]), (0,))
    dtypes = (input.dtype, weight.dtype, wide if bias is None else bias.dtype)
    grad_input, grad_weight, grad_bias = (
        input.new_empty(shape if need else empty, dtype=gradient_dtype(like))
        for shape, empty, need, like in zip(shapes, nothing, needs, dtypes, strict=True)
    )
    return grad_input, grad_weight, grad_bias


@linear_cross_entropy_op.register_fake
def _(input, weight, target, bias, class_weight, *options):  # type: ignore[no-untyped-def]
    *_, reduction, wanted, _, dtype, needs = options
    tokens = input.shape[0]
    wide = wide_dtype(dtype)
    size = CrossEntropyMetrics.SIZE if wanted > 0 else 0
    return (
        input.new_empty((tokens,) if reduction == "none" else (), dtype=wide),
        input.new_empty((size,), dtype=torch.float64),
        input.new_empty((RECORD_SIZE, tokens if wanted > 1 else 0), dtype=torch.float64),
        *_fake_gradients(input, weight, bias, dtype, [False] * 3 if reduction == "none" else needs),
    )


@linear_cross_entropy_backward_op.register_fake
def _(grad_loss, input, weight, target, bias, class_weight, *options):  # type: ignore[no-untyped-def]
    *_, dtype, needs = options
    return _fake_gradients(input, weight, bias, dtype, needs)
