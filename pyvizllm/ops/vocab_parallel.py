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
from pyvizllm.ops.metrics import CrossEntropyMetrics
from pyvizllm.ops.vocab_slices import (
    IGNORED,
    ClassSlices,
    RowOptions,
    RowState,
    class_slices,
    reduce_rows,
    sum_in_order,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["none", "mean", "sum"]
_ops = torch.ops.pyvizllm
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class LossOptions(NamedTuple):
    """What a call asks for, beside its tensors."""

    ignore_index: int
    reduction: str
    row: RowOptions
    metrics: bool


@overload
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
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
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[True],
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> tuple[Tensor, CrossEntropyMetrics]: ...
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    return_metrics: bool = False,
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
        bits. Where logits of different ranks are equal only after scale and cap have been rounded,
        the first five of the metrics go by the logits before. The gradient is that of this rank's
        logits; nothing is sent in the backward.

    Raises:
        ValueError: shapes, devices, `class_counts` or option values that do not fit.
        TypeError: a dtype or layout that is not supported, or something that is no tensor.
        IndexError: a target outside [0, C) that is not `ignore_index` (CPU).
        RuntimeError: torch.distributed is not initialized; a second derivative.

    Example:
        >>> logits = hidden @ weight_of_this_rank.T
        >>> loss = vocab_parallel_cross_entropy(logits, tokens, group=tensor_parallel_group)
        >>> loss.backward()
    """
    row = RowOptions(label_smoothing, z_loss, softcap, logit_scale)
    options = LossOptions(ignore_index, reduction, row, return_metrics)
    check_options(options)
    _check_tensors(input, target)
    class_dim = 0 if input.dim() == 1 else 1
    rows = input.movedim(class_dim, -1).reshape(target.numel(), input.shape[class_dim])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    targets = target.reshape(-1).long()
    slices = class_slices(rows, len(rows), rows.shape[1], group, class_counts)
    check_targets(targets, ignore_index, slices)
    loss, sums = _VocabParallel.apply(rows, targets, slices, options)
    return as_result(loss, sums, input, target, options)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, target: Tensor, slices: ClassSlices, options: LossOptions
    ) -> tuple[Tensor, Tensor]:
        row = reduce_rows(rows, target, options.ignore_index, slices, options.row, options.metrics)
        tokens = row.counted.sum()
        loss = reduce_loss(row.loss, tokens, options.reduction).to(accumulate_dtype(rows))
        ctx.mark_non_differentiable(row.sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, tokens, *row.state(loss.dtype))
        ctx.slices, ctx.options = slices, options
        return loss, row.sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if grad_loss is None:
            return None, None, None, None
        rows, tokens, *state = ctx.saved_tensors
        upstream = upstream_of_rows(grad_loss, tokens, ctx.options.reduction)
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


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def reduce_loss(losses: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    """[rows] float64 and the number of rows that count: the loss, float64."""
    if reduction == "none":
        return losses
    total = sum_in_order(losses)
    return total / tokens if reduction == "mean" else total


def upstream_of_rows(grad_loss: Tensor, tokens: Tensor, reduction: str) -> Tensor:
    """The upstream gradient of each row's loss, [] or [rows]."""
    if reduction != "mean":
        return grad_loss
    return (grad_loss.double() / tokens).to(grad_loss.dtype)


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True: a detached gradient would be silently wrong
        raise RuntimeError(
            "vocab_parallel: expected create_graph=False, got True: it has no second derivative"
        )


def as_result(
    loss: Tensor, sums: Tensor, input: Tensor, target: Tensor, options: LossOptions
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    if options.reduction == "none":
        loss = loss.reshape(target.shape)
    if loss.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        loss = loss.to(input.dtype)
    return (loss, CrossEntropyMetrics(sums)) if options.metrics else loss


# -- Checks ----------------------------------------------------------------------------------------


def check_options(options: LossOptions) -> None:
    if options.reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"vocab_parallel: expected reduction 'none', 'mean' or 'sum', got {options.reduction!r}"
        )
    smoothing, _, softcap, _ = options.row
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"vocab_parallel: expected label_smoothing in [0, 1], got {smoothing}")
    if not softcap >= 0.0:
        raise ValueError(f"vocab_parallel: expected softcap >= 0, got {softcap}")


def check_dense(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"vocab_parallel: expected {name} as a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"vocab_parallel: expected a dense {name}, got {layout}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"vocab_parallel: expected {name} of {expected}, got {value.dtype}")


def _check_tensors(input: Tensor, target: Tensor) -> None:
    check_dense("input", input, DTYPES)
    check_dense("target", target, (torch.int64, torch.int32, torch.uint8))
    if input.dim() == 0:
        raise ValueError("vocab_parallel: expected input of at least one dimension, got a scalar")
    class_dim = 0 if input.dim() == 1 else 1
    expected = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.shape != expected:
        raise ValueError(
            f"vocab_parallel: expected target of shape {list(expected)} for input of shape "
            f"{list(input.shape)}, got {list(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(
            f"vocab_parallel: expected target on input's device {input.device}, got {target.device}"
        )


def check_targets(target: Tensor, ignore_index: int, slices: ClassSlices) -> None:
    """Before anything is sent: the ranks have the same targets, so all of them raise."""
    invalid = ((target < 0) | (target >= slices.total)) & (target != ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(~invalid.any(), "vocab_parallel: a target is out of bounds")
    elif invalid.any():
        position = int(invalid.nonzero()[0])
        raise IndexError(
            f"vocab_parallel: target {int(target[position])} at position {position} is out of "
            f"bounds: expected 0 <= target < {slices.total} or ignore_index = {ignore_index}"
        )
