"""Softmax cross-entropy: loss, metrics and gradient from as few reads of the logits as possible."""

from __future__ import annotations

import re
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyvizllm.ops.cross_entropy_autograd import FusedInplace
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
            gradient costs one more pass and rounds the gradient a second time. With float16 and a
            loss scale, use False: what is below 6e-8 before the scale is applied becomes 0.
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
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale, 0, reduction)
    arguments = (rows, targets, None, *options, int(return_metrics))
    try:
        if not (fused and differentiate):
            loss, _, _, sums, _ = _ops.cross_entropy_forward(*arguments)
        elif inplace and not torch.compiler.is_compiling():
            _check_overwritable(input)
            loss, sums, _ = FusedInplace.apply(*arguments)
        else:
            loss, _, sums, _ = _ops.cross_entropy_fused(*arguments)
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
