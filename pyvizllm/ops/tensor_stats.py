"""Statistics and histograms of a list of tensors, from one read of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.cross_entropy_arguments import is_dtensor
from pyvizllm.ops.dtypes import FLOATING

BINS = 4096  # the top 12 bits of a float32: 1 sign, 8 exponent, 3 mantissa bits (csrc/bins.h)


@dataclass(frozen=True)
class TensorStats:
    """Statistics of `T` tensors, on their device; reading one does not copy anything.

    A NaN anywhere in a tensor makes its `sum`, `sum_squares`, `abs_sum`, `norm`, `min`, `max` and
    `abs_max` NaN. An empty tensor has `min` +inf, `max` -inf and `abs_max` 0.
    """

    values: Tensor
    """[7, T] float64: the rows named by the properties below."""
    counts: Tensor
    """[5, T] int64: zeros, NaNs, +Infs, -Infs, elements."""
    total_norm: Tensor
    """[] float64: the Euclidean norm over all elements of all tensors."""
    histogram: Tensor | None
    """[T, 4096] int64: elements per bin, the bin being the top 12 bits of the float32 pattern."""

    def __repr__(self) -> str:
        """Names and shapes: numbers would have to wait for the device."""
        names = [n for n, value in vars(type(self)).items() if isinstance(value, property)]
        histogram = None if self.histogram is None else list(self.histogram.shape)
        return (
            f"TensorStats({', '.join(names)}: {list(self.numel.shape)}, "
            f"total_norm: [], histogram: {histogram}, device: {self.values.device})"
        )

    @property
    def sum(self) -> Tensor:
        """[T] float64."""
        return self.values[0]

    @property
    def sum_squares(self) -> Tensor:
        """[T] float64."""
        return self.values[1]

    @property
    def abs_sum(self) -> Tensor:
        """[T] float64: the sum of |x|."""
        return self.values[2]

    @property
    def norm(self) -> Tensor:
        """[T] float64: the Euclidean norm."""
        return self.values[3]

    @property
    def min(self) -> Tensor:
        """[T] float64."""
        return self.values[4]

    @property
    def max(self) -> Tensor:
        """[T] float64."""
        return self.values[5]

    @property
    def abs_max(self) -> Tensor:
        """[T] float64: the largest |x|."""
        return self.values[6]

    @property
    def zeros(self) -> Tensor:
        """[T] int64: elements equal to zero, of either sign."""
        return self.counts[0]

    @property
    def nans(self) -> Tensor:
        """[T] int64."""
        return self.counts[1]

    @property
    def pos_infs(self) -> Tensor:
        """[T] int64."""
        return self.counts[2]

    @property
    def neg_infs(self) -> Tensor:
        """[T] int64."""
        return self.counts[3]

    @property
    def numel(self) -> Tensor:
        """[T] int64."""
        return self.counts[4]


def tensor_stats(tensors: Iterable[Tensor], *, histogram: bool | Tensor = True) -> TensorStats:
    """Computes statistics and 4096-bin histograms of a list of tensors in one pass.

    Args:
        tensors: at least one tensor; any shapes, also empty, of float32, float64, float16 or
            bfloat16, mixed as you like, all on one device. A tensor that is not contiguous is
            copied first.
        histogram: whether to count, or a contiguous int64 tensor [T, 4096] on the tensors' device
            to *add* the counts to, which is how histograms are accumulated over steps for nothing.

    Returns:
        A `TensorStats` of tensors on the same device, without gradients. Nothing waits for the
        device. The numbers are the same for any number of threads. Sums are float64 of float32
        block sums; float64 tensors are summed in float64 and counted in the bin of their value
        rounded to float32.

    Raises:
        TypeError: if `tensors` is no list, or something in it is no tensor, or sparse or quantized.
        ValueError: if the list is empty, or `histogram` has the wrong shape or dtype.

    Example:
        >>> stats = tensor_stats([p.grad for p in model.parameters()])
        >>> stats.total_norm, stats.histogram.sum(1)
    """
    tensors = list_of("tensor_stats", tensors)
    _check_tensor("tensor_stats", 0, tensors[0], tensors[0])
    counts = _histogram_tensor(tensors, histogram)
    # Statistics of parameters: numbers, and not the beginning of a graph that has no backward.
    with torch.no_grad():
        try:
            values, integers, total_norm = _OPERATOR(tensors, counts)
        except (RuntimeError, TypeError):
            # The operator checks the same things in a tenth of the time; what it says of them
            # depends on the device, and is never a TypeError or a ValueError of one sentence.
            check_tensors("tensor_stats", tensors)
            raise
    if isinstance(histogram, Tensor) and not histogram.is_inference():
        increment_version(histogram)  # it was added to, which autograd must see
    return TensorStats(values, integers, total_norm, counts)


_OPERATOR = torch.ops.pyvizllm.tensor_stats.default


def check_tensors(operation: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors as a list that the kernels take; TypeError or ValueError in `operation`'s name.

    For operations that are not called so often that a check of each tensor counts.
    """
    tensors = list_of(operation, tensors)
    for index, tensor in enumerate(tensors):
        _check_tensor(operation, index, tensor, tensors[0])
    return tensors


def list_of(operation: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors as a list, if there are any; TypeError or ValueError in `operation`'s name."""
    # A tensor could be iterated, and would give the statistics of its rows.
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{operation}: expected a list of tensors, got {type(tensors).__name__}")
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{operation}: expected at least one tensor, got an empty list")
    return tensors


def _check_tensor(operation: str, index: int, tensor: Tensor, first: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{operation}: expected tensors, got {type(tensor).__name__} at position {index}"
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{operation}: expected dense tensors, got {tensor.layout} at position {index}"
        )
    if is_dtensor(tensor):
        raise TypeError(
            f"{operation}: expected tensors that this process has whole, got a DTensor at position "
            f"{index}: give its to_local() or full_tensor()"
        )
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{operation}: expected float32, float64, float16 or bfloat16, "
            f"got {tensor.dtype} at position {index}"
        )
    if tensor.device != first.device:
        raise ValueError(
            f"{operation}: expected all tensors on {first.device}, got {tensor.device} "
            f"at position {index}"
        )


def _histogram_tensor(tensors: list[Tensor], histogram: bool | Tensor) -> Tensor | None:
    shape = (len(tensors), BINS)
    if isinstance(histogram, bool):
        return tensors[0].new_zeros(shape, dtype=torch.int64) if histogram else None
    if not isinstance(histogram, Tensor):
        raise TypeError(
            "tensor_stats: expected histogram to be a bool or an int64 tensor, "
            f"got {type(histogram).__name__}"
        )
    if histogram.shape != shape or histogram.dtype != torch.int64:
        raise ValueError(
            f"tensor_stats: expected histogram to be int64 of shape {list(shape)}, "
            f"got {histogram.dtype} of shape {list(histogram.shape)}"
        )
    if not histogram.is_contiguous() or histogram.device != tensors[0].device:
        raise ValueError(
            "tensor_stats: expected a contiguous histogram on the tensors' device "
            f"{tensors[0].device}, got one on {histogram.device} "
            f"with strides {histogram.stride()}"
        )
    return histogram


@torch.library.register_fake("pyvizllm::tensor_stats")
def _(tensors: list[Tensor], histogram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(
        "tensor_stats", tensors
    )  # a list with one meta tensor in it comes here, whatever the others are
    count = len(tensors)
    first = tensors[0]
    return (
        first.new_empty((7, count), dtype=torch.float64),
        first.new_empty((5, count), dtype=torch.int64),
        first.new_empty((), dtype=torch.float64),
    )
