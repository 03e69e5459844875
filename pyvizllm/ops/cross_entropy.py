"""Softmax cross-entropy: loss, metrics and gradient from as few reads of the logits as possible."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyvizllm.ops.cross_entropy_arguments import (
    Reduction,
    check_numbers,
    check_options,
    check_tensors,
    index_of,
    is_dtensor,
    overrides,
    result_dtype,
    torch_cross_entropy,
)
from pyvizllm.ops.cross_entropy_autograd import (
    FewLogits,
    Fused,
    FusedInplace,
    Recompute,
    call_kernel,
)
from pyvizllm.ops.cross_entropy_composition import composed_loss, composed_records, is_needed
from pyvizllm.ops.cross_entropy_layout import (
    as_rows,
    check_overwritable,
    flat_indices,
    has_positions,
)
from pyvizllm.ops.dtypes import wide_dtype
from pyvizllm.ops.metrics import CrossEntropyMetrics, TokenRecords, wanted_of

_ops = torch.ops.pyvizllm
_NAME = "cross_entropy"


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
    return_metrics: Literal[True, "per_token"],
    fused: bool = ...,
    inplace: bool = ...,
) -> tuple[Tensor, CrossEntropyMetrics]: ...
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
    return_metrics: bool | Literal["per_token"],
    fused: bool = ...,
    inplace: bool = ...,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]: ...
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
    return_metrics: bool | Literal["per_token"] = False,
    fused: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """Cross-entropy between logits and class indices or class probabilities: a drop-in for
    `torch.nn.functional.cross_entropy`.

    Args:
        input: logits, [C], [N, C] or [N, C, d1, ...], of float32, float64, float16 or bfloat16. A
            DTensor whose classes are sharded goes to `vocab_parallel_cross_entropy`, another to
            torch's own function (`fused` and `inplace` change nothing there).
            A class dimension with stride 1 (the last one of a contiguous tensor) is read in place.
            So is, on the CPU, one before contiguous dimensions of 16 or more positions (images),
            with class indices and neither `softcap` nor `logit_scale`. Any other is copied first.
        target: class indices, [] or [1], [N] or [N, d1, ...], of int64, int32 or uint8; or class
            probabilities, of the input's shape and any of its dtypes. Where a probability is 0 its
            class has no part in the loss, also with a logit of -Inf (torch: NaN).
        weight: class weights [C]; with class indices of the input's dtype.
        ignore_index: targets of this value do not count and get no gradient.
        reduction: "mean" over the tokens that count, each with its target's class weight (NaN if
            none do), over all tokens with probabilities; "sum" or "none".
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution (Szegedy et al.,
            2016, section 7).
        z_loss: adds `z_loss * logsumexp**2` per token, times its target's class weight (PaLM,
            Chowdhery et al., 2022, section 5).
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, 2024, section 2), and
            one of -Inf `-softcap`: a class that is masked out has a part again; 0 for none.
        logit_scale: logits are multiplied by it first.
        return_metrics: also return a `CrossEntropyMetrics`, taken from the same read; "per_token":
            with the loss, entropy and rank of each token in its `per_token`.
        fused: compute the gradient in the forward, while the row is in cache, for an upstream
            gradient of 1. Fastest when the loss is what `backward` is called on; any other upstream
            gradient costs one more pass and rounds the gradient a second time. With float16 and a
            loss scale, use False: what is below 6e-8 before the scale is applied becomes 0.
        inplace: with `fused`, write the gradient over `input`, which must not be used afterwards.
            Nothing is allocated. Autograd is told: an earlier operation that saved `input` raises
            in its backward. Under `torch.compile` neither `fused` nor `inplace` changes anything.

    Returns:
        The loss, [] or [N, d1, ...], of the input's dtype (float32 under autocast; with
        probabilities what they and the class weights promote it to); with `return_metrics` a pair
        of it and the metrics. Arithmetic is float32 (float64 for float64) and rounds once. Results
        are the same for any number of threads. The default mode can be differentiated twice; its
        backward reads the logits again, which nobody must have written to since.

        On the CPU a gradient of 32 to 512 MiB is written into the memory that the last one left,
        unless that is too small or more than twice as large. One such block stays allocated, until
        64 gradients of other sizes have come. Its storage cannot be resized, and torch's profiler
        does not count it.

        What the kernels cannot differentiate is composed of torch's operations, in several times
        the time and memory: second derivatives, probabilities or (with them) class weights that
        require grad, forward-mode differentiation, the transforms of `torch.func` and
        `torch.jit.trace` (for which `fused` and `inplace` change nothing), and devices other than
        the CPU and CUDA.

    Raises:
        torch's errors under torch's conditions, and:
        ValueError: option values that do not fit; `inplace` on logits that are not laid out row by
            row, each in memory of its own.
        TypeError: something that is no tensor; `ignore_index` that is no int.
        NotImplementedError: a dtype or layout of the input that is not supported.
        IndexError: a target outside [0, C) that is not `ignore_index` (CPU; RuntimeError under
            torch.compile).
        RuntimeError: other shapes, dtypes and devices that do not fit; `label_smoothing` outside
            [0, 1] (torch lets negative ones pass); `inplace` on a leaf that requires grad, or on a
            view of one; a second derivative with `fused`.

    Example:
        >>> loss = cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=0.1)
        >>> loss.backward()
    """
    if overrides(input) or overrides(target) or overrides(weight):
        return _overridden(
            input,
            target,
            weight,
            {
                "ignore_index": ignore_index,
                "reduction": reduction,
                "label_smoothing": label_smoothing,
            },
            {
                "z_loss": z_loss,
                "softcap": softcap,
                "logit_scale": logit_scale,
                "return_metrics": return_metrics,
                "fused": fused,
                "inplace": inplace,
            },
        )
    ignore_index = index_of(ignore_index)
    check_numbers(_NAME, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)
    reduction = check_options(
        _NAME, ignore_index, reduction, label_smoothing, softcap, return_metrics, fused, inplace
    )
    if is_dtensor(input):
        from pyvizllm.ops import vocab_dtensor  # which imports this module

        return vocab_dtensor.dtensor_cross_entropy(
            _NAME,
            input,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            return_metrics=return_metrics,
        )
    soft = check_tensors(_NAME, input, target, weight, ignore_index)
    dtype = result_dtype(input, target, weight)
    shape = target.shape
    if soft:
        shape = input.shape[:1][: input.dim() - 1] + input.shape[2:]
        # Of two dtypes the wider one, in which nothing is lost; the gradient is cast back.
        common = torch.promote_types(input.dtype, target.dtype)
        common = dtype if dtype == torch.float64 else common
        input, target = input.to(common), target.to(common)
    elif input.dim() == 1:
        shape = torch.Size()  # also of a target [1], as in torch
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale, 0, reduction)
    wanted = wanted_of(return_metrics)
    try:
        no_class = soft and input.shape[min(input.dim() - 1, 1)] == 0
        call = (input, target, weight, options, wanted, shape)
        if no_class or is_needed(input, target, weight):
            loss, metrics = _composed(*call, inplace)
        else:
            loss, metrics = _kernels(*call, dtype, fused, inplace)
    except (RuntimeError, IndexError) as error:
        # As torch does, with the sentence alone: what is before it is a place in our sources.
        sentence = re.search(r"(cross_entropy: target|index) .* is out of bounds.*", str(error))
        if sentence is None:
            raise
        raise IndexError(sentence.group()) from None
    loss = loss.to(dtype)
    if reduction == "none":
        loss = loss.reshape(shape)
    return loss if metrics is None else (loss, metrics)


def _overridden(
    input: Any,
    target: Any,
    weight: Any,
    options: dict[str, Any],
    of_ours: dict[str, Any],
) -> Any:
    """What tensors with a `__torch_function__` of their own make of torch's function, or of ours.

    Ours, where there is an option that torch's does not have.
    """
    relevant = tuple(value for value in (input, target, weight) if value is not None)
    defaults = inspect.signature(cross_entropy).parameters
    more = {name: v for name, v in of_ours.items() if v != defaults[name].default}
    ours = bool(set(more) - {"fused", "inplace"})
    function: Callable[..., Any] = cross_entropy if ours else torch_cross_entropy
    extra = of_ours if ours else {}
    return torch.overrides.handle_torch_function(
        function, relevant, input, target, weight, **options, **extra
    )


def _kernels(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: tuple[Any, ...],
    wanted: int,
    shape: torch.Size,
    dtype: torch.dtype,
    fused: bool,
    inplace: bool,
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    *_, softcap, logit_scale, _, _ = options
    if not inplace and has_positions(input, target, softcap, logit_scale):
        logits = input if input.dim() == 3 else input.flatten(2)
        targets = flat_indices(target)
    else:
        logits, targets = as_rows(input, target, inplace)
    if weight is not None:
        weight = weight.detach().to(wide_dtype(input.dtype)).contiguous()
    tensors = (logits, targets.detach(), weight)
    options = (*options, wanted)
    differentiate = torch.is_grad_enabled() and input.requires_grad
    noted: list[Tensor] = []  # sums and records
    if torch.compiler.is_compiling():  # the compiler knows the operator, and its derivative
        # Never fused: whether the upstream gradient is 1 nobody sees in a compiled backward, and
        # one more pass over the gradient costs more than to read the logits again.
        loss, _, _, *noted = _ops.cross_entropy_forward(*tensors, *options)
    elif not differentiate:
        operator = _ops.cross_entropy_forward.default
        loss, _, _, *noted = call_kernel(operator, (*tensors, *options))
    elif not fused:
        few = logits.is_cpu and logits.numel() <= FewLogits.MOST and options[-2] != "none"
        function = FewLogits if few else Recompute
        loss = function.apply(*tensors, options, dtype, noted)
    elif inplace:
        check_overwritable(input)
        loss = FusedInplace.apply(*tensors, options, dtype, noted)
        # A view gets a new grad_fn then, but when it is asked for only: a hook that is registered
        # before crashes torch (2.13).
        _ = input.grad_fn
    else:
        loss = Fused.apply(*tensors, options, dtype, noted)
    if wanted == 0:
        return loss, None
    sums, records = (tensor.detach() for tensor in noted)
    if wanted == 1:
        return loss, CrossEntropyMetrics(sums)
    per_token = TokenRecords(records).per_token(targets.detach(), shape)
    return loss, CrossEntropyMetrics(sums, per_token)


def _composed(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: tuple[Any, ...],
    wanted: int,
    shape: torch.Size,
    inplace: bool,
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    rows, targets = as_rows(input, target, inplace)
    loss = composed_loss(rows, targets, weight, *options)
    if wanted == 0:
        return loss, None
    ignore_index, _, _, softcap, logit_scale, *_ = options
    noted, counts = composed_records(rows, targets, ignore_index, softcap, logit_scale)
    targets = targets.detach()
    per_token = noted.per_token(targets, shape) if wanted == 2 else None
    return loss, CrossEntropyMetrics(noted.sums(targets, counts, rows.shape[1]), per_token)
