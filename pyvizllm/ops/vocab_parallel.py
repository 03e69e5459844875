"""Softmax cross-entropy of logits whose classes are spread over the ranks of a process group.

Forward: one read of this rank's slice, one all-gather of a few numbers of each row (see
vocab_slices.py). Backward: one read and one write, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.cross_entropy_arguments import (
    Reduction,
    check_numbers,
    check_options,
    check_tensors,
    index_of,
    result_dtype,
)
from pyvizllm.ops.cross_entropy_layout import as_rows
from pyvizllm.ops.dtypes import wide_dtype
from pyvizllm.ops.metrics import CrossEntropyMetrics, wanted_of
from pyvizllm.ops.vocab_slices import (
    IGNORED,
    ClassSlices,
    RowOptions,
    RowState,
    class_slices,
    metrics_of,
    reduce_rows,
    sum_in_order,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.pyvizllm
_NAME = "vocab_parallel_cross_entropy"


class LossOptions(NamedTuple):
    """What a call asks for, beside its tensors."""

    ignore_index: int
    reduction: str
    row: RowOptions
    wanted: int  # 0 the loss, 1 also the metrics, 2 also those of each token


@overload
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[False] = ...,
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> Tensor: ...
@overload
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[True, "per_token"],
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> tuple[Tensor, CrossEntropyMetrics]: ...
@overload
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: bool | Literal["per_token"],
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]: ...
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    return_metrics: bool | Literal["per_token"] = False,
    group: ProcessGroup | None = None,
    class_counts: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """Cross-entropy of logits of which each rank of a group holds a slice of the classes.

    The slices are contiguous and in the order of the group's ranks; their sizes may differ. All
    ranks of the group have to call it, with the same targets and options.

    Args:
        input: this rank's logits, [C_local], [N, C_local] or [N, C_local, d1, ...], of float32,
            float64, float16 or bfloat16.
        target: class indices among the classes of all ranks, [], [N] or [N, d1, ...], of int64,
            int32 or uint8; the same on all ranks.
        ignore_index, reduction, z_loss, softcap, logit_scale, return_metrics: as in
            `pyvizllm.cross_entropy`.
        label_smoothing: in [0, 1]; uniform over the classes of all ranks.
        group: the ranks; the default group where it is None.
        class_counts: the number of classes of each rank. Where it is None the ranks ask one another
            first, which on a GPU makes the host wait: give it in a training loop.

    Returns:
        The loss, [] or the target's shape, of the input's dtype (float32 under autocast); with
        `return_metrics` a pair of it and the metrics of the whole rows. All ranks get the same
        bits. The gradient is that of this rank's logits; nothing is sent in the backward.

    Raises:
        ValueError: `class_counts`, a group or tokens that do not fit.
        IndexError: a target outside [0, C) that is not `ignore_index` (CPU).
        RuntimeError: torch.distributed is not initialized; a second derivative.
        NotImplementedError: class probabilities; a dtype or layout that is not supported.
        The rest as `pyvizllm.cross_entropy`.

    Example:
        >>> logits = hidden @ weight_of_this_rank.T
        >>> loss = vocab_parallel_cross_entropy(logits, tokens, group=tensor_parallel_group)
        >>> loss.backward()
    """
    ignore_index = index_of(ignore_index)
    check_numbers(_NAME, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)
    reduction = check_options(
        _NAME, ignore_index, reduction, label_smoothing, softcap, return_metrics, False, False
    )
    tensors = isinstance(input, Tensor) and isinstance(target, Tensor)
    if tensors and input.dim() == 1 and target.shape == (1,):
        target = target[0]  # beside a slice of one class it would be taken for probabilities
    check_tensors(_NAME, input, target, None, ignore_index)
    if target.is_floating_point():
        raise NotImplementedError(
            f"{_NAME}: expected class indices, got class probabilities "
            f"(target of {target.dtype}), which are not supported"
        )
    rows, targets = as_rows(input, target, False)
    slices = class_slices(_NAME, rows, len(rows), rows.shape[1], group, class_counts)
    check_targets(_NAME, targets, ignore_index, slices)
    options = loss_options(
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_metrics
    )
    loss, records = _VocabParallel.apply(rows, targets.long(), slices, options)
    shape = torch.Size() if input.dim() == 1 else target.shape
    loss = loss.reshape(shape if reduction == "none" else ()).to(result_dtype(input, target, None))
    if options.wanted == 0:
        return loss
    per_token = options.wanted > 1
    return loss, metrics_of(records, targets, ignore_index, slices, per_token, shape)


def loss_options(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_metrics: bool | str,
) -> LossOptions:
    row = RowOptions(label_smoothing, z_loss, softcap, logit_scale)
    return LossOptions(ignore_index, reduction, row, wanted_of(return_metrics))


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, target: Tensor, slices: ClassSlices, options: LossOptions
    ) -> tuple[Tensor, Tensor]:
        row = reduce_rows(rows, target, options.ignore_index, slices, options.row, options.wanted)
        tokens = row.counted.sum()
        loss = reduce_loss(row.loss, tokens, options.reduction).to(wide_dtype(rows.dtype))
        ctx.mark_non_differentiable(row.records)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, tokens, *row.state(loss.dtype))
        ctx.slices, ctx.options = slices, options
        return loss, row.records

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(_NAME)
        if grad_loss is None:
            return None, None, None, None
        rows, tokens, *state = ctx.saved_tensors
        upstream = grad_loss
        if ctx.options.reduction == "mean":
            upstream = (grad_loss.double() / tokens).to(grad_loss.dtype)
        grad = rows_gradient(upstream, rows, RowState(*state), ctx.slices, ctx.options.row)
        return grad, None, None, None


def rows_gradient(
    upstream: Tensor,  # [] or [rows]
    rows: Tensor,  # [rows, classes of this rank]
    state: RowState,
    slices: ClassSlices,
    options: RowOptions,
) -> Tensor:
    """[rows, classes of this rank]: the gradient of this rank's logits."""
    if slices.classes == 0:
        return torch.zeros_like(rows)
    reduction = "sum" if upstream.dim() == 0 else "none"
    return _ops.cross_entropy_backward(
        upstream, rows, state.local_target, None, state.max, state.sum_exp, IGNORED, *options,
        slices.total, reduction,
    )  # fmt: skip


def reduce_loss(losses: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    """[rows] float64 and the number of rows that count: the loss, float64."""
    if reduction == "none":
        return losses
    total = sum_in_order(losses)
    return total / tokens if reduction == "mean" else total


def refuse_second_derivative(operation: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True: a detached gradient would be silently wrong
        raise RuntimeError(
            f"{operation}: expected create_graph=False, got True: it has no second derivative"
        )


def check_targets(operation: str, target: Tensor, ignore_index: int, slices: ClassSlices) -> None:
    """Before anything is sent: the ranks have the same targets, so all of them raise."""
    invalid = ((target < 0) | (target >= slices.total)) & (target != ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(~invalid.any(), f"{operation}: a target is out of bounds")
    elif invalid.any():
        position = int(invalid.nonzero()[0])
        raise IndexError(
            f"{operation}: target {int(target[position])} at position {position} is out of "
            f"bounds: expected 0 <= target < {slices.total} or ignore_index = {ignore_index}"
        )
