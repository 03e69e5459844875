"""Softmax cross-entropy: loss, metrics and gradient from as few reads of the logits as possible."""

from __future__ import annotations

import re
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.metrics import CrossEntropyMetrics

Reduction = Literal["none", "mean", "sum"]
_ops = torch.ops.pyvizllm


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[False] = ...,
    fused: bool = ...,
    inplace: bool = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[True],
    fused: bool = ...,
    inplace: bool = ...,
) -> tuple[Tensor, CrossEntropyMetrics]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    return_metrics: bool = False,
    fused: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """Cross-entropy between logits and class indices, as `torch.nn.functional.cross_entropy`.

    Args:
        input: logits, [C], [N, C] or [N, C, d1, ...], of float32, float64, float16 or bfloat16.
            A class dimension with stride 1 (the last one of a contiguous tensor) is read in place,
            any other is copied first.
        target: class indices, [], [N] or [N, d1, ...], of int64, int32 or uint8.
        weight: class weights; not supported yet.
        ignore_index: targets of this value do not count and get no gradient.
        reduction: "mean" over the tokens that count (NaN if none do), "sum" or "none".
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution (Szegedy et al.,
            2016, section 7).
        z_loss: adds `z_loss * logsumexp(input)**2` per token (PaLM, Chowdhery et al., 2022,
            section 5).
        softcap, logit_scale: not supported yet.
        return_metrics: also return a `CrossEntropyMetrics`, taken from the same read.
        fused: compute the gradient in the forward, while the row is in cache, for an upstream
            gradient of 1. Fastest when the loss is what `backward` is called on; any other upstream
            gradient costs one more pass and rounds the gradient a second time.
        inplace: with `fused`, write the gradient over `input`, which must not be used afterwards.
            Nothing is allocated. Autograd is told: an earlier operation that saved `input` raises
            in its backward. Under `torch.compile` a new tensor is used instead.

    Returns:
        The loss, [] or the target's shape, of the input's dtype (float32 under autocast); with
        `return_metrics` a pair of it and the metrics. Arithmetic is float32 (float64 for float64)
        and rounds once. Results are the same for any number of threads. The default mode can be
        differentiated twice.

    Raises:
        ValueError: shapes, devices or option values that do not fit; `inplace` on logits that are
            not laid out row by row, each in memory of its own.
        TypeError: a dtype or layout that is not supported, or something that is no tensor.
        IndexError: a target outside [0, C) that is not `ignore_index` (CPU).
        RuntimeError: `inplace` on a leaf that requires grad, or on a view of one; a second
            derivative with `fused`.
        NotImplementedError: an option that is not supported yet; forward-mode differentiation.

    Example:
        >>> loss = cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=0.1)
        >>> loss.backward()
    """
    _check_options(weight, reduction, label_smoothing, softcap, logit_scale, fused, inplace)
    _check_tensors(input, target)
    rows, targets = _as_rows(input, target, inplace)
    differentiate = torch.is_grad_enabled() and input.requires_grad
    arguments = (rows, targets, ignore_index, label_smoothing, z_loss, reduction, return_metrics)
    try:
        if not (fused and differentiate):
            loss, _, _, sums = _ops.cross_entropy_forward(*arguments)
        elif inplace and not torch.compiler.is_compiling():
            _check_overwritable(input)
            loss, sums = _FusedInplace.apply(*arguments)
        else:
            loss, _, sums = _ops.cross_entropy_fused(*arguments)
    except RuntimeError as error:
        # As torch does, with the sentence alone: what is before it is a place in our sources.
        sentence = re.search(r"cross_entropy: target .* is out of bounds.*", str(error))
        if sentence is None:
            raise
        raise IndexError(sentence.group()) from None
    if reduction == "none":
        loss = loss.reshape(target.shape)
    if loss.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        loss = loss.to(input.dtype)
    return (loss, CrossEntropyMetrics(sums.detach())) if return_metrics else loss


# -- Arguments -------------------------------------------------------------------------------------


def _check_options(
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    fused: bool,
    inplace: bool,
) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"cross_entropy: expected reduction 'none', 'mean' or 'sum', got {reduction!r}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"cross_entropy: expected label_smoothing in [0, 1], got {label_smoothing}"
        )
    if inplace and not fused:
        raise ValueError(
            "cross_entropy: expected fused=True with inplace=True (the gradient is written over "
            "the logits in the forward), got fused=False"
        )
    for name, value, default in (
        ("weight", weight, None),
        ("softcap", softcap, 0.0),
        ("logit_scale", logit_scale, 1.0),
    ):
        if value is not default and value != default:
            raise NotImplementedError(f"cross_entropy: {name} is not supported yet, got {value!r}")


def _check_tensors(input: Tensor, target: Tensor) -> None:
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"cross_entropy: expected {name} to be a tensor, got {type(value).__name__}"
            )
        if value.layout != torch.strided or value.is_nested:
            layout = "a nested tensor" if value.is_nested else value.layout
            raise TypeError(f"cross_entropy: expected a dense {name}, got {layout}")
    if input.dim() == 0:
        raise ValueError("cross_entropy: expected input of at least one dimension, got a scalar")
    if target.is_floating_point():
        raise NotImplementedError(
            f"cross_entropy: class probabilities are not supported yet, got target {target.dtype}"
        )
    if input.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(
            "cross_entropy: expected input of float32, float64, float16 or bfloat16, "
            f"got {input.dtype}"
        )
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(
            f"cross_entropy: expected target of int64, int32 or uint8, got {target.dtype}"
        )
    if target.device != input.device:  # the kernel would read memory that is not there
        raise ValueError(
            f"cross_entropy: expected target on input's device {input.device}, got {target.device}"
        )
    # Without a formula for tangents autograd would go on with one of zero, and not say so.
    if (
        not torch.compiler.is_compiling()
        and forward_ad._current_level >= 0
        and forward_ad.unpack_dual(input).tangent is not None
    ):
        raise NotImplementedError(
            "cross_entropy: forward-mode differentiation is not supported, got an input with a "
            "tangent; use torch.nn.functional.cross_entropy there"
        )


def _as_rows(input: Tensor, target: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """Logits as [rows, C] with class stride 1, and targets as a contiguous [rows]."""
    class_dim = 0 if input.dim() == 1 else 1
    expected = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.shape != expected:
        raise ValueError(
            f"cross_entropy: expected target of shape {list(expected)} for input of shape "
            f"{list(input.shape)}, got {list(target.shape)}"
        )
    classes = input.shape[class_dim]
    rows = input
    if inplace:
        rows = _writable_rows(input, class_dim)
    elif input.dim() != 2:
        rows = input.movedim(class_dim, -1).reshape(target.numel(), classes)
    if rows.stride(1) != 1 and classes > 1:
        rows = rows.contiguous()
    if target.dtype == torch.uint8:
        target = target.long()
    return rows, target.reshape(-1).contiguous()


def _writable_rows(input: Tensor, class_dim: int) -> Tensor:
    """Logits as [rows, C] in their own memory, where the gradient can be written over them."""
    rows = input
    try:
        if input.dim() != 2:
            rows = input.movedim(class_dim, -1).view(-1, input.shape[class_dim])
        one_place = rows.shape[1] <= 1 or rows.stride(1) == 1
    except RuntimeError:  # no view of the rows: they would have to be copied
        one_place = False
    if not one_place:
        raise ValueError(
            "cross_entropy: expected input with class stride 1 and rows one step apart for "
            f"inplace=True, got shape {list(input.shape)} with strides {list(input.stride())}"
        )
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(
            "cross_entropy: expected input whose rows share no memory for inplace=True, got shape "
            f"{list(input.shape)} with strides {list(input.stride())} (of expand? clone it first)"
        )
    return rows


def _check_overwritable(input: Tensor) -> None:
    base = input._base  # what `input` is a view of
    if input.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise RuntimeError(
            "cross_entropy: expected inplace=True on logits that a model computed, got a leaf "
            "that requires grad (or a view of one), whose values would be lost"
        )


# -- Recompute mode --------------------------------------------------------------------------------


def _setup_recompute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, *options, _ = inputs
    _, row_max, row_sum, sums = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, row_sum, sums)
    ctx.save_for_backward(input, target, row_max, row_sum)
    ctx.options = options


def _recompute_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    input, target, row_max, row_sum = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        grad = _differentiable_gradient(grad_loss, input, target, *ctx.options)
    else:
        grad = _ops.cross_entropy_backward(grad_loss, input, target, row_max, row_sum, *ctx.options)
    return (grad, *[None] * 6)


def _differentiable_gradient(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """The same gradient, composed of torch's operations, for a second derivative."""
    logits = input.to(grad_loss.dtype)
    log_sum_exp = logits.logsumexp(1, keepdim=True)
    probability = (logits - log_sum_exp).exp()
    counts = (target != ignore_index).unsqueeze(1)
    index = target.long().where(counts.squeeze(1), 0).unsqueeze(1)
    grad = probability * (1 + 2 * z_loss * log_sum_exp) - label_smoothing / logits.shape[1]
    grad = grad.scatter_add(1, index, grad.new_full(index.shape, label_smoothing - 1))
    upstream = grad_loss.unsqueeze(1) if reduction == "none" else grad_loss
    if reduction == "mean":
        upstream = upstream / counts.sum()
    return (grad * upstream).where(counts, 0).to(input.dtype)


torch.library.register_autograd(
    "pyvizllm::cross_entropy_forward", _recompute_backward, setup_context=_setup_recompute
)


# -- Fused mode ------------------------------------------------------------------------------------


def _scale_gradient(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """Applies the upstream gradient to one that was computed for an upstream gradient of 1."""
    if torch.is_grad_enabled():  # create_graph=True: a detached gradient would be silently wrong
        raise RuntimeError(
            "cross_entropy: fused=True has no second derivative; use fused=False with create_graph"
        )
    if grad_loss.dim() == 1:
        return grad * grad_loss.unsqueeze(1)
    # On the CPU the value is at hand; on a GPU reading it would wait for the device, and while a
    # graph is traced (the tensor is of a subclass) there is none.
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and bool(grad_loss == 1):
        # Over a retained graph it is needed again: what comes next may keep it, and add to it.
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        return grad.clone() if retained else grad
    return grad * grad_loss


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, sums = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the logits
    ctx.mark_non_differentiable(grad, sums)
    ctx.save_for_backward(grad)


def _fused_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    (grad,) = ctx.saved_tensors
    return (_scale_gradient(grad, grad_loss), *[None] * 6)


torch.library.register_autograd(
    "pyvizllm::cross_entropy_fused", _fused_backward, setup_context=_setup_fused
)


class _FusedInplace(torch.autograd.Function):
    """Fused mode with the gradient written over the logits."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, sums = _ops.cross_entropy_fused_(input, *arguments)
        # Whoever saved the logits for its own backward now finds them changed, and raises.
        torch.autograd.graph.increment_version(input)
        ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(input)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (_scale_gradient(grad.detach(), grads[0]), *[None] * 6)


# -- Fake kernels ----------------------------------------------------------------------------------


def _fake_loss(input: Tensor, reduction: str) -> Tensor:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty((input.shape[0],) if reduction == "none" else (), dtype=dtype)


def _fake_metrics(input: Tensor, metrics: bool) -> Tensor:
    return input.new_empty((CrossEntropyMetrics.SIZE if metrics else 0,), dtype=torch.float64)


@torch.library.register_fake("pyvizllm::cross_entropy_forward")
def _(input, target, ignore_index, label_smoothing, z_loss, reduction, metrics):  # type: ignore[no-untyped-def]
    row = _fake_loss(input, "none")
    sums = _fake_metrics(input, metrics)
    return _fake_loss(input, reduction), row, torch.empty_like(row, dtype=torch.float64), sums


@torch.library.register_fake("pyvizllm::cross_entropy_backward")
def _(grad_loss, input, *_):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape)


@torch.library.register_fake("pyvizllm::cross_entropy_fused")
def _(input, target, ignore_index, label_smoothing, z_loss, reduction, metrics):  # type: ignore[no-untyped-def]
    grad = input.new_empty(input.shape)
    return _fake_loss(input, reduction), grad, _fake_metrics(input, metrics)


@torch.library.register_fake("pyvizllm::cross_entropy_fused_")
def _(input, target, ignore_index, label_smoothing, z_loss, reduction, metrics):  # type: ignore[no-untyped-def]
    return _fake_loss(input, reduction), _fake_metrics(input, metrics)
