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

from pyvizllm.ops.metrics import CrossEntropyMetrics
from pyvizllm.ops.vocab_parallel import (
    DTYPES,
    LossOptions,
    Reduction,
    accumulate_dtype,
    as_result,
    check_dense,
    check_options,
    check_targets,
    reduce_loss,
    refuse_second_derivative,
    rows_gradient,
    upstream_of_rows,
)
from pyvizllm.ops.vocab_slices import ClassSlices, RowOptions, RowState, class_slices, reduce_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHUNK_ELEMENTS = 1 << 23  # logits of a chunk where its size is not given
_CHUNK_ROWS = 128  # at least: the weight is read once for each chunk


@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
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
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    return_metrics: Literal[True],
    chunk_size: int | None = ...,
    group: ProcessGroup | None = ...,
    class_counts: Sequence[int] | None = ...,
) -> tuple[Tensor, CrossEntropyMetrics]: ...
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    return_metrics: bool = False,
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
        and round once.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `vocab_parallel_cross_entropy`.

    Example:
        >>> loss = vocab_parallel_linear_cross_entropy(hidden, weight_of_this_rank, tokens)
        >>> loss.backward()
    """
    row = RowOptions(label_smoothing, z_loss, softcap, logit_scale)
    options = LossOptions(ignore_index, reduction, row, return_metrics)
    check_options(options)
    _check_tensors(input, weight, target, bias)
    hidden = input.reshape(-1, input.shape[-1])
    targets = target.reshape(-1).long()
    slices = class_slices(input, len(hidden), len(weight), group, class_counts)
    check_targets(targets, ignore_index, slices)
    if chunk_size is None:  # of what all ranks know: they have to take the same chunks
        chunk_size = max(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(1, *slices.counts))
    elif chunk_size < 1:
        raise ValueError(f"vocab_parallel: expected chunk_size >= 1, got {chunk_size}")
    loss, sums = _VocabParallelLinear.apply(
        hidden, weight, bias, targets, slices, options, chunk_size, torch.is_grad_enabled()
    )
    return as_result(loss, sums, input, target, options)


def _check_tensors(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    check_dense("input", input, DTYPES)
    check_dense("weight", weight, DTYPES)
    check_dense("target", target, (torch.int64, torch.int32, torch.uint8))
    if input.dim() == 0 or weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            "vocab_parallel: expected input [..., H] and weight [C_local, H], got "
            f"{list(input.shape)} and {list(weight.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"vocab_parallel: expected target of shape {list(input.shape[:-1])} for input of shape "
            f"{list(input.shape)}, got {list(target.shape)}"
        )
    others = {"weight": weight, "target": target}
    if bias is not None:
        check_dense("bias", bias, DTYPES)
        others["bias"] = bias
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"vocab_parallel: expected bias of shape {[len(weight)]}, got {list(bias.shape)}"
            )
    for name, value in others.items():
        if value.device != input.device:
            raise ValueError(
                f"vocab_parallel: expected {name} on input's device {input.device}, "
                f"got {value.device}"
            )
        mixed = value.dtype != input.dtype and name != "target"
        if mixed and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(
                f"vocab_parallel: expected {name} of input's dtype {input.dtype}, got {value.dtype}"
            )


class _Layer:
    """The layer in the dtype it is computed in, and its gradients, summed up chunk by chunk."""

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.input, self.weight = input.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.grads: list[Tensor | None] = [None, None, None]  # of input, weight and bias

    def want_gradients(self, wanted: Sequence[bool]) -> None:
        dtype = accumulate_dtype(self.input)
        self.grads = [
            torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
            if tensor is not None and want
            else None
            for tensor, want in zip((self.input, self.weight, self.bias), wanted, strict=True)
        ]

    def logits(self, chunk: slice) -> Tensor:
        return torch.nn.functional.linear(self.input[chunk], self.weight, self.bias)

    def add_gradients(self, chunk: slice, grad_logits: Tensor) -> None:
        grad_input, grad_weight, grad_bias = self.grads
        if grad_input is not None:
            _add_product(grad_input[chunk], grad_logits, self.weight)
        if grad_weight is not None:
            _add_product(grad_weight, grad_logits.T, self.input[chunk])
        if grad_bias is not None:
            grad_bias += grad_logits.sum(0, dtype=grad_bias.dtype)

    def sum_over_ranks(self, group: ProcessGroup) -> None:
        if self.grads[0] is not None and self.grads[0].numel() > 0:
            dist.all_reduce(self.grads[0], group=group)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with the product in total's dtype: 16 bits would round each chunk's."""
    if a.dtype == total.dtype or a.device.type != "cuda":
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


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
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        layer = _Layer(input, weight, bias, dtype)
        now = differentiate and options.reduction != "none"
        if now:
            layer.want_gradients(ctx.needs_input_grad[:3])
        one = torch.ones((), dtype=accumulate_dtype(layer.input), device=input.device)
        losses = input.new_empty(len(input), dtype=torch.float64)
        size = CrossEntropyMetrics.SIZE if options.metrics else 0
        sums = input.new_zeros(size, dtype=torch.float64)
        states = []
        with torch.autocast(device, enabled=False):
            for chunk in _chunks(len(input), chunk_size):
                logits = layer.logits(chunk)
                row = reduce_rows(
                    logits, target[chunk], options.ignore_index, slices, options.row,
                    options.metrics,
                )  # fmt: skip
                losses[chunk] = row.loss
                sums += row.sums
                state = row.state(one.dtype)
                if now:
                    grad_logits = rows_gradient(one, logits, state, slices, options.row)
                    layer.add_gradients(chunk, grad_logits)
                elif differentiate:
                    states.append(state)
        if now:
            layer.sum_over_ranks(slices.group)
        tokens = (target != options.ignore_index).sum()
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.slices, ctx.options, ctx.chunk_size, ctx.dtype = slices, options, chunk_size, dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (input, weight, bias)]
        if now:
            ctx.save_for_backward(tokens, *layer.grads)
        elif states:
            parts = [torch.cat(part) for part in zip(*states, strict=True)]
            ctx.save_for_backward(tokens, input, weight, bias, *parts)
        else:
            ctx.save_for_backward(tokens, input, weight, bias)
        return reduce_loss(losses, tokens, options.reduction).to(one.dtype), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if grad_loss is None:
            return (None,) * 8
        tokens, *saved = ctx.saved_tensors
        if ctx.options.reduction == "none":
            grads = _gradients_of_rows(ctx, grad_loss, *saved)
        else:
            upstream = upstream_of_rows(grad_loss, tokens, ctx.options.reduction)
            grads = [None if grad is None else grad * upstream for grad in saved]
        rounded = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*rounded, *[None] * 5)


def _gradients_of_rows(
    ctx: Any,
    grad_loss: Tensor,  # [rows]
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *state: Tensor,  # local targets, row maxima, row sums; nothing where there are no rows
) -> list[Tensor | None]:
    layer = _Layer(input, weight, bias, ctx.dtype)
    layer.want_gradients(ctx.needs_input_grad[:3])
    with torch.autocast(input.device.type, enabled=False):
        for chunk in _chunks(len(input), ctx.chunk_size):
            grad_logits = rows_gradient(
                grad_loss[chunk],
                layer.logits(chunk),
                RowState(*(part[chunk] for part in state)),
                ctx.slices,
                ctx.options.row,
            )
            layer.add_gradients(chunk, grad_logits)
    layer.sum_over_ranks(ctx.slices.group)
    return layer.grads
