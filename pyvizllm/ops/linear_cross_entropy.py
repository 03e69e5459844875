"""The cross-entropy of a linear layer's output, which is never there as a whole."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.cross_entropy_arguments import (
    Reduction,
    check_numbers,
    check_options,
    index_of,
    is_autocast_on,
    is_dtensor,
)
from pyvizllm.ops.cross_entropy_composition import is_needed
from pyvizllm.ops.dtypes import wide_dtype
from pyvizllm.ops.linear_cross_entropy_arguments import check_layer, product_dtype
from pyvizllm.ops.linear_cross_entropy_autograd import linear_cross_entropy_op
from pyvizllm.ops.metrics import CrossEntropyMetrics, PerToken, TokenRecords, wanted_of

_NAME = "linear_cross_entropy"


@overload
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    class_weight: Tensor | None = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[False] = ...,
    chunk_size: int | None = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    class_weight: Tensor | None = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[True, "per_token"],
    chunk_size: int | None = ...,
) -> tuple[Tensor, CrossEntropyMetrics]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    class_weight: Tensor | None = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: bool | Literal["per_token"],
    chunk_size: int | None = ...,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]: ...
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    return_metrics: bool | Literal["per_token"] = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """`cross_entropy(F.linear(input, weight, bias), target, ...)`, some tokens at a time.

    There is never more than one chunk of logits. The gradients of input, weight and bias come with
    the loss, in the forward; with `reduction="none"`, in the backward, from logits that are
    computed again. Of what does not require grad no product is computed. On the CPU ignored tokens
    are left out altogether.

    Args:
        input: hidden states [..., H], of float32, float64, float16 or bfloat16.
        weight: of the linear layer, [C, H], of the input's dtype (any, under autocast). A DTensor
            whose classes are sharded goes to `vocab_parallel_linear_cross_entropy`, another through
            `torch.nn.functional.linear`; the input has to be a DTensor too.
        target: class indices [...], of int64, int32 or uint8, or class probabilities [..., C].
        bias: of the linear layer, [C].
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_metrics: as
            in `cross_entropy`.
        class_weight: [C], `weight` of `cross_entropy`.
        chunk_size: how many tokens at a time; None: from the shape, fewer if memory is short.
            Results differ by rounding from one size to another.

    Returns:
        The loss, [] or [...], of the input's dtype (float32 under autocast); with `return_metrics`
        a pair of it and the metrics. Products are computed in the input's dtype (autocast's, under
        autocast); the weight's gradient is summed over chunks in float32 (float64 for float64) and
        rounded once. An upstream gradient other than 1 rounds gradients of bfloat16 a second time;
        those of float16 are taken in its range and wait for it in float32, so a loss scale works. A
        second derivative, probabilities or (with them) class weights that require grad, and
        torch.func compute all logits at once.

    Raises:
        ValueError: shapes, devices, dtypes or option values that do not fit.
        TypeError: a dtype or layout that is not supported, or something that is no tensor.
        IndexError: a target outside [0, C) that is not `ignore_index` (CPU).
        RuntimeError: as `cross_entropy`, of `label_smoothing` and `ignore_index`.

    Example:
        >>> loss = linear_cross_entropy(hidden, model.lm_head.weight, tokens, softcap=30.0)
        >>> loss.backward()
    """
    ignore_index = index_of(ignore_index)
    check_numbers(_NAME, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)
    reduction = check_options(
        _NAME, ignore_index, reduction, label_smoothing, softcap, return_metrics, False, False
    )
    if is_dtensor(weight):
        from pyvizllm.ops import vocab_dtensor  # which imports this module

        return vocab_dtensor.dtensor_linear_cross_entropy(
            input,
            weight,
            target,
            bias,
            class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            return_metrics=return_metrics,
            chunk_size=chunk_size,
        )
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    loss, metrics = wide_linear_cross_entropy(
        input, weight, target, bias, class_weight, options, reduction, return_metrics, chunk_size
    )
    dtype = input.dtype
    if is_autocast_on(input.device):
        dtype = loss.dtype
    return loss.to(dtype) if metrics is None else (loss.to(dtype), metrics)


def wide_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: tuple[int, float, float, float, float],
    reduction: Reduction,
    return_metrics: bool | Literal["per_token"] = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    """The loss in float32 (float64 for float64), and the metrics if wanted."""
    check_layer(_NAME, input, weight, target, bias, class_weight, chunk_size)
    if target.is_floating_point() and options[0] >= 0:
        raise RuntimeError(
            "linear_cross_entropy: ignore_index is not supported for class probabilities, "
            f"got {options[0]}"
        )
    dtype = product_dtype(_NAME, input, weight, bias)
    classes = weight.shape[0]
    shape = input.shape[:-1]
    tokens = math.prod(shape)  # not shape.numel(), which an export would take for a constant
    rows = input.reshape(tokens, input.shape[-1])
    if target.is_floating_point():
        targets = target.reshape(tokens, classes)
    else:
        targets = (target.long() if target.dtype == torch.uint8 else target).reshape(-1)
    arguments = (rows, weight, targets.contiguous(), bias, class_weight)
    layer = (input, weight) if bias is None else (input, weight, bias)
    if any(is_needed(tensor, target, class_weight) for tensor in layer):
        return _composed(*arguments, options, reduction, return_metrics, shape)
    grad = torch.is_grad_enabled()
    needs = [grad and tensor.requires_grad for tensor in layer] + [False] * (3 - len(layer))
    wanted = wanted_of(return_metrics)
    loss, sums, records, *_ = linear_cross_entropy_op(
        *arguments, *options, reduction, wanted, chunk_size, dtype, needs
    )
    loss = loss.reshape(shape if reduction == "none" else ())
    if wanted == 0:
        return loss, None
    per_token = None
    if wanted == 2:
        per_token = TokenRecords(records.detach()).per_token(targets.detach(), shape)
    return loss, CrossEntropyMetrics(sums.detach(), per_token)


def _composed(
    input: Tensor,  # [tokens, H]
    weight: Tensor,
    target: Tensor,  # [tokens] or [tokens, C]
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: tuple[int, float, float, float, float],
    reduction: Reduction,
    return_metrics: bool | Literal["per_token"],
    shape: torch.Size,
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    """All logits at once: for what has to be differentiated in ways that chunks are not."""
    ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
    logits = torch.nn.functional.linear(input, weight, bias)
    logits = logits.to(wide_dtype(logits.dtype))
    result = cross_entropy(
        logits,
        target,
        None if class_weight is None else class_weight.to(logits.dtype),
        ignore_index,
        reduction,
        label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        return_metrics=return_metrics,
    )
    loss, metrics = result if isinstance(result, tuple) else (result, None)
    if metrics is not None and metrics.per_token is not None:
        of_tokens = metrics.per_token
        of_tokens = PerToken(*(getattr(of_tokens, name).reshape(shape) for name in _PER_TOKEN))
        metrics = CrossEntropyMetrics(metrics.sums, of_tokens)
    return loss.reshape(shape if reduction == "none" else ()), metrics


_PER_TOKEN = ("loss", "entropy", "rank")
