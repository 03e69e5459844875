"""Loss and gradients of a linear layer and its cross-entropy, some tokens at a time.

One buffer [chunk, classes] holds the logits of a chunk; the kernel writes their gradient over them,
and two products turn that into the gradients of the input and of the weight, before the next chunk
comes. A chunk reads the weight twice, reads and writes its gradient once, and nothing of the size
of all logits is ever there. The plain way stores the logits, their gradient, and what the softmax
keeps: 3 * tokens * classes numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.dtypes import wide_dtype
from pyvizllm.ops.linear_cross_entropy_gradients import CLASS_BLOCK, Gradients, GradientSink
from pyvizllm.ops.metrics import RECORD_SIZE, CrossEntropyMetrics

_ops = torch.ops.pyvizllm
Options = tuple[int, float, float, float, float]
"""ignore_index, label_smoothing, z_loss, softcap, logit_scale"""

_CPU_ROWS = 256  # as many as keep the products busy: more gain nothing
_CUDA_BYTES = 384 << 20


@dataclass(frozen=True)
class Linear:
    """A linear layer in front of a cross-entropy over `tokens` rows."""

    input: Tensor  # [tokens, features]
    weight: Tensor  # [classes, features]
    bias: Tensor | None  # [classes]
    dtype: torch.dtype  # in which the products are computed

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.dtype)


@dataclass(frozen=True)
class Targets:
    """What the loss compares the logits with."""

    target: Tensor  # [tokens], or probabilities [tokens, classes]
    class_weight: Tensor | None  # [classes]
    options: Options
    wanted: int  # 0 the loss, 1 metrics too, 2 also a record of each token


@dataclass
class Loss:
    loss: Tensor  # [] or [tokens], wide
    sums: Tensor  # [53], or [0] where not wanted
    records: Tensor  # [7, tokens], or [7, 0]


def chunk_rows(linear: Linear, tokens: int, loss_dtype: torch.dtype) -> int:
    """How many tokens at a time, from the shape; fewer where memory is short.

    Every chunk reads and writes the weight's gradient once more. On the CPU 64, or up to a tenth of
    the tokens: from 640 tokens on the chunk is about a tenth of the logits. On a GPU the bytes
    decide.
    """
    sizes = linear.dtype.itemsize
    if loss_dtype != linear.dtype:  # a copy for the loss, and its gradient for the products
        sizes += loss_dtype.itemsize + linear.dtype.itemsize
    row_bytes = max(1, linear.weight.shape[0] * sizes)
    if linear.input.device.type == "cuda":
        rows = _CUDA_BYTES // row_bytes // 128 * 128
        properties = torch.cuda.get_device_properties(linear.input.device)
        free = properties.total_memory - torch.cuda.memory_allocated(linear.input.device)
    else:
        rows = min(_CPU_ROWS, max(64, -(-tokens // 10)))
        free = _available_memory()
    rows = max(1, min(max(rows, 64), free // 4 // row_bytes))
    count = max(1, -(-tokens // rows))
    return -(-tokens // count) if tokens > 0 else 1  # chunks of the same size


def _available_memory() -> int:
    """Bytes that the host's system can give; sys.maxsize where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return sys.maxsize


def _loss_dtype(linear: Linear, targets: Targets, needs: Sequence[bool]) -> torch.dtype:
    """In which the loss reads the logits: that of the products, or a wider one.

    As wide as probabilities are. Float32 where gradients of float16 follow: below 6e-8 they would
    be 0.
    """
    dtype = linear.dtype
    if targets.target.dim() == 2:
        dtype = torch.promote_types(dtype, targets.target.dtype)
    return torch.float32 if dtype == torch.float16 and any(needs) else dtype


def loss_and_gradients(
    linear: Linear,
    targets: Targets,
    reduction: str,
    chunk: int | None,
    needs: Sequence[bool],  # gradients of the input, the weight, the bias
    grad_loss: Tensor | None = None,  # [tokens], with reduction "none"
) -> tuple[Loss, Gradients]:
    """The loss, and the gradients for an upstream gradient of 1, or of `grad_loss` by token."""
    tokens, classes = linear.input.shape[0], linear.weight.shape[0]
    _check_range(targets, classes)
    kept = _kept_tokens(targets)
    count = tokens if kept is None else len(kept)
    divisor, factor = _mean(targets) if reduction == "mean" else (None, None)
    loss_dtype = _loss_dtype(linear, targets, needs)
    scale = None
    if linear.dtype == torch.float16 and any(needs):
        scale = _scale_of_float16(targets, grad_loss)
        factor = 1 / scale if factor is None else factor / scale
    total = _Total(linear, targets, reduction, kept)
    sink = GradientSink(linear, needs, kept, factor)
    chunk = chunk_rows(linear, count, loss_dtype) if chunk is None else max(1, min(chunk, count))
    logits_of = LogitsBuffer(linear, chunk)
    class_weight = targets.class_weight
    if class_weight is not None:
        class_weight = class_weight.to(wide_dtype(loss_dtype)).contiguous()
    kind = "none" if reduction == "none" else "sum"
    for begin in range(0, count, chunk):
        rows = slice(begin, min(begin + chunk, count))
        index = rows if kept is None else kept[rows]
        x = linear.input[index].to(linear.dtype)
        target = targets.target[index]
        if target.dim() == 2:
            target = target.to(loss_dtype)
        logits = logits_of(x).to(loss_dtype)
        arguments = (logits, target, class_weight, *targets.options, 0, kind, targets.wanted)
        if any(needs):
            loss, sums, records = _ops.cross_entropy_fused_(*arguments)
            if grad_loss is not None:
                logits.mul_(grad_loss[index].unsqueeze(1))
            if scale is not None:
                logits.mul_(scale)
            sink.add(index, x, logits.to(linear.dtype), logits_of.weight)
        else:
            loss, _, _, sums, records = _ops.cross_entropy_forward(*arguments)
        total.add(index, loss, sums, records)
    return total.result(divisor), sink.result()


def _check_range(targets: Targets, classes: int) -> None:
    """On the CPU; on a GPU the kernel asserts, and the host waits for nothing."""
    target, ignore_index = targets.target, targets.options[0]
    if target.dim() == 2 or target.device.type != "cpu":
        return
    invalid = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if invalid.any():
        row = int(invalid.nonzero()[0])
        raise IndexError(
            f"linear_cross_entropy: target {int(target[row])} at position {row} is out of bounds: "
            f"expected 0 <= target < {classes} or ignore_index = {ignore_index}"
        )


def _kept_tokens(targets: Targets) -> Tensor | None:
    """The tokens that count, where some do not and their products can be left out.

    On the CPU only: how many there are is known to the host there. None: all are taken.
    """
    target = targets.target
    if target.dim() == 2 or target.device.type != "cpu":
        return None
    kept = (target != targets.options[0]).nonzero().squeeze(1)
    return kept if len(kept) < len(target) else None


def _mean(targets: Targets) -> tuple[Tensor, Tensor]:
    """[] float64: what the reduction "mean" divides the loss by, and multiplies gradients by.

    Where no token counts the loss is NaN and the gradients are 0, as in torch.
    """
    target, class_weight = targets.target, targets.class_weight
    if target.dim() == 2:
        tokens = target.shape[0]
        divisor = torch.full((), tokens, dtype=torch.float64, device=target.device)
        return divisor, torch.full_like(divisor, 1 / tokens if tokens > 0 else 0)
    counts = target != targets.options[0]
    if class_weight is None:
        divisor = counts.sum(dtype=torch.float64)
    else:
        weights = class_weight.double()[target.where(counts, 0).long()]
        divisor = weights.where(counts, 0).sum()
    return divisor, (1 / divisor).where(counts.any(), 0)


def _scale_of_float16(targets: Targets, grad_loss: Tensor | None) -> Tensor:
    """[] float64, a power of 2: gradients of the logits are multiplied by it, then float16.

    The largest possible one becomes 32768 of 65504. Only a z-loss has no bound: its part is taken
    for what a log-sum-exp of 1024 gives.
    """
    target, (_, _, z_loss, _, logit_scale) = targets.target, targets.options
    bound = abs(logit_scale) * (1 + 2 * abs(z_loss) * 1024)
    largest = torch.full((), bound, dtype=torch.float64, device=target.device)
    sums = target.abs().sum(1).clamp(min=1) if target.dim() == 2 else None
    for factor in (targets.class_weight, grad_loss, sums):
        if factor is not None and factor.numel() > 0:
            largest = largest * factor.abs().amax()
    scale = (32768 / largest).log2().floor().exp2()
    return scale.where((largest > 0) & largest.isfinite(), 1)


class LogitsBuffer:
    """Computes the logits of a chunk, always in the same memory."""

    def __init__(self, linear: Linear, chunk: int) -> None:
        self.weight = linear.weight.to(linear.dtype)
        self.bias = None if linear.bias is None else linear.bias.to(linear.dtype)
        self.classes = self.weight.shape[0]
        line = 64 // linear.dtype.itemsize  # rows begin on cache lines: 50257 is odd
        self.buffer = self.weight.new_empty((chunk, -(-self.classes // line) * line))
        # oneDNN's bfloat16 products on AMX read on to the end of the line, and NaN times 0 is NaN
        # (oneDNN issue 5717).
        self.buffer[:, self.classes :] = 0
        blocked = linear.input.device.type == "cpu" and linear.dtype.itemsize >= 4
        self.block = CLASS_BLOCK if blocked else max(self.classes, 1)

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.buffer[: len(x), : self.classes]
        for begin in range(0, self.classes, self.block):
            block = slice(begin, begin + self.block)
            weight = self.weight[block].t()
            if self.bias is None:
                torch.mm(x, weight, out=logits[:, block])
            else:
                torch.addmm(self.bias[block], x, weight, out=logits[:, block])
        return logits


class _Total:
    """Adds up what the kernel says of the chunks."""

    def __init__(
        self, linear: Linear, targets: Targets, reduction: str, kept: Tensor | None
    ) -> None:
        tokens = linear.input.shape[0]
        rows = tokens if reduction == "none" else 0
        new = linear.input.new_zeros
        self.reduction, self.wide = reduction, linear.wide
        self.rows = new((rows,), dtype=linear.wide)
        self.loss = new((), dtype=torch.float64)
        self.sums = new((CrossEntropyMetrics.SIZE if targets.wanted > 0 else 0,)).double()
        noted = tokens if targets.wanted > 1 else 0
        self.records = torch.full_like(new((RECORD_SIZE, noted)), torch.nan, dtype=torch.float64)

    def add(self, index: slice | Tensor, loss: Tensor, sums: Tensor, records: Tensor) -> None:
        if self.reduction == "none":
            self.rows[index] = loss
        else:
            self.loss += loss
        if self.sums.numel() > 0:
            self.sums += sums
        if self.records.numel() > 0:
            self.records[:, index] = records

    def result(self, divisor: Tensor | None) -> Loss:
        loss = self.loss if divisor is None else self.loss / divisor
        loss = self.rows if self.reduction == "none" else loss.to(self.wide)
        return Loss(loss, self.sums, self.records)
