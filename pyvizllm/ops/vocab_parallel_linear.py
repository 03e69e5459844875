"""Linear layer and softmax cross-entropy, with the layer's outputs (the classes) spread over ranks.

The logits exist for one chunk of tokens at a time, twice: as logits and as their gradient. Every
rank has all tokens, so the gradient of the layer's input is a sum over the ranks: one all-reduce,
in the forward. With reduction "none" the rows' upstream gradients are not known there: the backward
computes the logits again, and has the all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from pyvizllm.ops.cross_entropy_arguments import (
    Reduction,
    check_numbers,
    check_options,
    index_of,
)
from pyvizllm.ops.linear_cross_entropy_arguments import check_layer, product_dtype
from pyvizllm.ops.linear_cross_entropy_chunks import Linear, LogitsBuffer
from pyvizllm.ops.linear_cross_entropy_gradients import WeightGradient, gradient_dtype
from pyvizllm.ops.metrics import RECORD_SIZE, CrossEntropyMetrics
from pyvizllm.ops.vocab_parallel import (
    LossOptions,
    check_targets,
    loss_options,
    reduce_loss,
    refuse_second_derivative,
    rows_gradient,
)
from pyvizllm.ops.vocab_slices import (
    ClassSlices,
    RowState,
    class_slices,
    metrics_of,
    reduce_rows,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAME = "vocab_parallel_linear_cross_entropy"
_CHUNK_ELEMENTS = 1 << 23  # logits of a chunk where its size is not given
_CHUNK_ROWS = 128  # at least: the weight is read once for each chunk


@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[False] = ...,
    chunk_size: int | None = ...,
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> Tensor: ...
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[True, "per_token"],
    chunk_size: int | None = ...,
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> tuple[Tensor, CrossEntropyMetrics]: ...
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: bool | Literal["per_token"],
    chunk_size: int | None = ...,
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]: ...
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    return_metrics: bool | Literal["per_token"] = False,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    class_counts: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """Cross-entropy of `input @ weight.T + bias`, with rows of `weight` spread over a group.

    All ranks of the group have to call it, with the same input, targets and options, and with
    inputs that all or none of them differentiate.

    Args:
        input: hidden states, [N, H] or [..., H], of float32, float64, float16 or bfloat16; the same
            on all ranks.
        weight: this rank's rows of the layer's weight, [C_local, H], of the input's dtype, or any
            under autocast.
        target: class indices among the classes of all ranks, [N] or [...]; the same on all ranks.
        bias: this rank's part, [C_local], or None.
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_metrics,
            group, class_counts: as in `vocab_parallel_cross_entropy`.
        chunk_size: tokens whose logits exist at a time, the same on all ranks; None: some 8 million
            logits. Each chunk's records are one all-gather.

    Returns:
        As `vocab_parallel_cross_entropy`, with gradients for input (the sum over all ranks), weight
        and bias (this rank's). Sums over tokens and ranks are float32 (float64 for float64 input)
        and round once. Gradients of the logits are of the products' dtype: with float16, what is
        below 6e-8 before a loss scale is applied becomes 0.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `vocab_parallel_cross_entropy`.

    Example:
        >>> loss = vocab_parallel_linear_cross_entropy(hidden, weight_of_this_rank, tokens)
        >>> loss.backward()
    """
    ignore_index = index_of(ignore_index)
    check_numbers(_NAME, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)
    reduction = check_options(
        _NAME, ignore_index, reduction, label_smoothing, softcap, return_metrics, False, False
    )
    check_layer(_NAME, input, weight, target, bias, None, chunk_size)
    if target.is_floating_point():
        raise NotImplementedError(
            f"{_NAME}: expected class indices, got class probabilities "
            f"(target of {target.dtype}), which are not supported"
        )
    dtype = product_dtype(_NAME, input, weight, bias)
    hidden, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1).long()
    slices = class_slices(_NAME, input, len(hidden), len(weight), group, class_counts)
    check_targets(_NAME, targets, ignore_index, slices)
    if chunk_size is None:  # from what all ranks know: they have to take the same chunks
        chunk_size = max(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(1, *slices.counts))
    options = loss_options(
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_metrics
    )
    loss, records = _VocabParallelLinear.apply(
        hidden, weight, bias, targets, slices, options, chunk_size, dtype, torch.is_grad_enabled()
    )
    loss = loss.reshape(target.shape if reduction == "none" else ())
    if not torch.is_autocast_enabled(input.device.type):
        loss = loss.to(input.dtype)
    if options.wanted == 0:
        return loss
    per_token = options.wanted > 1
    return loss, metrics_of(records, targets, ignore_index, slices, per_token, target.shape)


class _Gradients:
    """Of input, weight and bias, summed up chunk by chunk; of the input over the ranks, too."""

    def __init__(self, linear: Linear, needs: Sequence[bool]) -> None:
        self.linear, self.needs = linear, needs
        new = linear.input.new_zeros
        self.input = new(linear.input.shape if needs[0] else 0, dtype=linear.wide)
        self.weight = WeightGradient(linear.weight if needs[1] else linear.weight[:0])
        self.bias = new(len(linear.weight) if needs[2] else 0, dtype=linear.wide)
        self.first = True

    def add(self, chunk: slice, x: Tensor, grad_logits: Tensor, weight: Tensor) -> None:
        """x: [chunk, H], grad_logits: [chunk, C_local], weight: [C_local, H], of one dtype"""
        if self.needs[0]:
            self.input[chunk] = _wide_product(grad_logits, weight, self.linear.wide)
        if self.needs[1]:
            self.weight.add(grad_logits, x, self.first, 1.0)
            self.first = False
        if self.needs[2]:
            self.bias += grad_logits.sum(0, dtype=self.linear.wide)

    def result(self, group: ProcessGroup, factor: Tensor | None) -> list[Tensor]:
        """Times `factor`, and rounded once."""
        if self.needs[0] and self.input.numel() > 0:
            dist.all_reduce(self.input, group=group)
        if self.first:  # there was no chunk
            self.weight.zero()
        if factor is not None:
            self.input *= factor
            self.bias *= factor
        bias = self.linear.weight if self.linear.bias is None else self.linear.bias
        return [
            self.input.to(gradient_dtype(self.linear.input.dtype)),
            self.weight.result(factor),
            self.bias.to(gradient_dtype(bias.dtype)),
        ]


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: ranks add what is not rounded yet."""
    if a.dtype == dtype or a.device.type != "cuda":
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))


class _VocabParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        slices: ClassSlices,
        options: LossOptions,
        chunk_size: int,
        dtype: torch.dtype,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        linear = Linear(input, weight, bias, dtype)
        needs = [differentiate and need for need in ctx.needs_input_grad[:3]]
        tokens = (target != options.ignore_index).sum()
        with torch.autocast(input.device.type, enabled=False):
            if options.reduction == "none":
                losses, records, *state = _forward(
                    linear, target, slices, options, chunk_size, None
                )
                saved: list[Any] = [input, weight, bias, *state]
            else:
                grads = _Gradients(linear, needs)
                losses, records, *_ = _forward(linear, target, slices, options, chunk_size, grads)
                factor = None
                if options.reduction == "mean":  # where no token counts gradients are 0, as torch's
                    factor = (1 / tokens.double()).where(tokens > 0, 0)
                saved = grads.result(slices.group, factor) if any(needs) else []
        ctx.mark_non_differentiable(records)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.linear = (slices, options, chunk_size, dtype)
        ctx.dtypes = [None if t is None else t.dtype for t in (input, weight, bias)]
        return reduce_loss(losses, tokens, options.reduction).to(linear.wide), records

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(_NAME)
        if grad_loss is None:
            return (None,) * 9
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if ctx.linear[1].reduction == "none":
            grads = _gradients_of_rows(grad_loss, saved, needs, *ctx.linear)
        else:
            grads = [grad * grad_loss for grad in saved]
        found = zip(grads, ctx.dtypes, needs, strict=True)
        return (*(grad.to(dtype) if need else None for grad, dtype, need in found), *[None] * 6)


def _forward(
    linear: Linear,
    target: Tensor,  # [tokens]
    slices: ClassSlices,
    options: LossOptions,
    chunk_size: int,
    grads: _Gradients | None,
) -> tuple[Tensor, ...]:
    """Losses [tokens] float64, records [7, tokens or 0] and the tensors of all rows' RowState."""
    tokens = len(linear.input)
    logits_of = LogitsBuffer(linear, min(chunk_size, tokens))
    one = linear.input.new_ones((), dtype=linear.wide)
    losses = linear.input.new_empty(tokens, dtype=torch.float64)
    records = losses.new_empty((RECORD_SIZE, tokens if options.wanted > 0 else 0))
    state = RowState(
        torch.empty_like(target),
        torch.empty_like(losses, dtype=linear.wide),
        torch.empty_like(losses),
    )
    for chunk in _chunks(tokens, chunk_size):
        x = linear.input[chunk].to(linear.dtype)
        logits = logits_of(x)
        row = reduce_rows(
            logits, target[chunk], options.ignore_index, slices, options.row, options.wanted
        )
        losses[chunk] = row.loss
        if options.wanted > 0:
            records[:, chunk] = row.records
        found = row.state(linear.wide)
        for all_rows, of_chunk in zip(state, found, strict=True):
            all_rows[chunk] = of_chunk
        if grads is not None and any(grads.needs):
            grad_logits = rows_gradient(one, logits, found, slices, options.row)
            grads.add(chunk, x, grad_logits, logits_of.weight)
    return losses, records, *state


def _gradients_of_rows(
    grad_loss: Tensor,  # [tokens]
    saved: Sequence[Any],
    needs: Sequence[bool],
    slices: ClassSlices,
    options: LossOptions,
    chunk_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    input, weight, bias, *state = saved
    linear = Linear(input, weight, bias, dtype)
    with torch.autocast(input.device.type, enabled=False):
        grads = _Gradients(linear, needs)
        logits_of = LogitsBuffer(linear, min(chunk_size, len(input)))
        for chunk in _chunks(len(input), chunk_size):
            x = input[chunk].to(dtype)
            of_chunk = RowState(*(part[chunk] for part in state))
            upstream = grad_loss[chunk]
            grad_logits = rows_gradient(upstream, logits_of(x), of_chunk, slices, options.row)
            grads.add(chunk, x, grad_logits, logits_of.weight)
        return grads.result(slices.group, None)
