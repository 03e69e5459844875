"""Gradients of a linear layer's input, weight and bias, from those of its output, by chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyvizllm.ops.linear_cross_entropy_chunks import Linear

CLASS_BLOCK = 1024  # of float32 weights on the CPU: MKL's x @ w.T is 1.4 times as fast in blocks


@dataclass
class Gradients:
    """Of what is asked for; the others are empty."""

    input: Tensor
    weight: Tensor
    bias: Tensor


class GradientSink:
    """Turns gradients of the logits, chunk by chunk, into those of input, weight and bias.

    A factor is applied to float32 numbers before they are rounded: on the CPU, which knows it, by
    the products themselves; on a GPU afterwards.
    """

    def __init__(
        self,
        linear: Linear,
        needs: Sequence[bool],
        kept: Tensor | None,
        factor: Tensor | None,  # []
    ) -> None:
        self.needs = needs
        self.on_cpu = linear.input.device.type == "cpu"
        self.factor = factor
        self.alpha = float(self.factor) if self.on_cpu and self.factor is not None else 1.0
        self.first = True
        new = linear.input.new_zeros if kept is not None else linear.input.new_empty
        dtype = gradient_dtype(linear.input.dtype)
        self.input = new(linear.input.shape if needs[0] else (0,), dtype=dtype)
        self.weight = WeightGradient(linear.weight if needs[1] else linear.weight[:0])
        self.bias_dtype = linear.wide if linear.bias is None else linear.bias.dtype
        bias_shape = (linear.weight.shape[0] if needs[2] else 0,)
        self.bias = linear.input.new_zeros(bias_shape, dtype=linear.wide)

    def add(self, index: slice | Tensor, x: Tensor, grad: Tensor, weight: Tensor) -> None:
        if self.needs[0]:
            self._add_input(index, grad, weight)
        if self.needs[1]:
            self.weight.add(grad, x, self.first, self.alpha)
            self.first = False
        if self.needs[2]:
            self.bias += grad.sum(0, dtype=self.bias.dtype)

    def _add_input(self, index: slice | Tensor, grad: Tensor, weight: Tensor) -> None:
        if self.on_cpu and grad.dtype == torch.float16:  # which small sums would not fit
            rows = grad.new_zeros((len(grad), weight.shape[1]), dtype=torch.float32)
            for begin in range(0, len(weight), CLASS_BLOCK):
                block = slice(begin, begin + CLASS_BLOCK)
                rows.addmm_(grad[:, block].float(), weight[block].float(), alpha=self.alpha)
        elif self.on_cpu:
            rows = torch.addmm(grad.new_zeros(()), grad, weight, beta=0, alpha=self.alpha)
        elif grad.dtype.itemsize == 2:
            rows = torch.mm(grad, weight, out_dtype=torch.float32)
        else:
            rows = torch.mm(grad, weight)
        if not self.on_cpu and self.factor is not None:
            rows = rows * self.factor
        self.input[index] = rows.to(self.input.dtype)

    def result(self) -> Gradients:
        if self.first:  # there was no chunk
            self.weight.zero()
        if self.factor is not None:
            self.bias *= self.factor
        factor = None if self.on_cpu else self.factor
        bias = self.bias.to(gradient_dtype(self.bias_dtype))
        return Gradients(self.input, self.weight.result(factor), bias)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient waits for the upstream gradient.

    Float32 for float16: what a loss scale would have saved is not lost before it is applied.
    """
    return torch.float32 if dtype == torch.float16 else dtype


class WeightGradient:
    """A sum of products [classes, features] in float32, rounded once to the weight's dtype.

    For bfloat16 the first half of the classes is summed in the memory of the gradient itself, which
    has just the room, and only the second half in memory of its own. At the end the rows are
    rounded from the front of that memory to the front: row r from the bytes of rows 2r and 2r + 1.
    """

    def __init__(self, weight: Tensor) -> None:  # [classes, features]
        classes, features = weight.shape
        self.gradient = torch.empty_like(
            weight, dtype=gradient_dtype(weight.dtype), memory_format=torch.contiguous_format
        )
        self.parts = [self.gradient]
        if self.gradient.dtype.itemsize == 2:
            half = classes // 2
            memory = self.gradient.view(-1)[: 2 * half * features].view(torch.float32)
            rest = weight.new_empty((classes - half, features), dtype=torch.float32)
            self.parts = [memory.view(half, features), rest]

    def add(self, grad: Tensor, x: Tensor, first: bool, alpha: float) -> None:
        """grad: [chunk, classes], x: [chunk, features]"""
        begin = 0
        for part in self.parts:
            columns = grad[:, begin : begin + len(part)].t()
            begin += len(part)
            _add_product(part, columns, x, 0 if first else 1, alpha)

    def zero(self) -> None:
        for part in self.parts:
            part.zero_()

    def result(self, factor: Tensor | None) -> Tensor:
        if factor is not None:
            for part in self.parts:
                part *= factor
        if len(self.parts) > 1:
            first, second = self.parts
            if len(first) > 0:
                self.gradient[0] = first[0].to(self.gradient.dtype)  # over itself: by way of a copy
            begin = 1
            while begin < len(first):  # rows [n, 2n) lie behind where they go, to the byte
                end = min(2 * begin, len(first))
                self.gradient[begin:end] = first[begin:end]
                begin = end
            self.gradient[len(first) :] = second  # last: the first half's sums were there
        return self.gradient


def _add_product(sum_: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    """sum_ = beta * sum_ + alpha * a @ b, in the sum's dtype."""
    if sum_.dtype == a.dtype:
        torch.addmm(sum_, a, b, beta=beta, alpha=alpha, out=sum_)
    elif a.device.type == "cuda":
        torch.addmm(sum_, a, b, beta=beta, alpha=alpha, out_dtype=sum_.dtype, out=sum_)
    else:  # widened in blocks: a copy of the chunk in float32 would be twice as large as the chunk
        b = b.to(sum_.dtype)
        for begin in range(0, len(a), 4 * CLASS_BLOCK):
            block = slice(begin, begin + 4 * CLASS_BLOCK)
            out = sum_[block]
            torch.addmm(out, a[block].to(sum_.dtype), b, beta=beta, alpha=alpha, out=out)
