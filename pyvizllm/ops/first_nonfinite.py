"""Where the first NaN or Inf of each of a list of tensors is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.tensor_stats import check_tensors, list_of

_ROW_SHIFT = 40  # kFoundRowShift of csrc/kernels.h
INDEX_MASK = (1 << _ROW_SHIFT) - 1
"""The bits of `found` that are the index."""


def first_nonfinite_(
    tensors: Iterable[Tensor], counts: Tensor, found: Tensor, *, row: int = 0
) -> None:
    """Finds the first NaN or Inf of each tensor that has one; the host does not wait to know.

    Nothing is read of the tensors that have none, so that this can be called at every step.

    Args:
        tensors: T tensors of fewer than 2**40 elements, as `tensor_stats` takes them.
        counts: [5, T] int64: `TensorStats.counts` of the same tensors.
        found: [T] int64, in place. Where it is -1 and the tensor has a NaN or an Inf it becomes
            `row * 2**40 + index`, index being that of the first in row-major order; what is found
            already stays. `decode_nonfinite` takes it apart.
        row: the caller's number of this call, from 0 up to 2**22, rising from call to call.

    Raises:
        TypeError, ValueError: for tensors that `tensor_stats` would not take.
        RuntimeError: for `counts`, `found` or `row` of another shape, dtype or size.

    Example:
        >>> stats = tensor_stats(gradients)
        >>> found = torch.full((len(gradients),), -1)
        >>> first_nonfinite_(gradients, stats.counts, found)
    """
    tensors = list_of("first_nonfinite_", tensors)
    with torch.no_grad():
        try:
            _OPERATOR(tensors, counts, row, found)
        except (RuntimeError, TypeError, IndexError):
            # The operator checks the same in a tenth of the time, and is asked at every step.
            check_tensors("first_nonfinite_", tensors)
            raise


_OPERATOR = torch.ops.pyvizllm.first_nonfinite_.default


def decode_nonfinite(found: int) -> tuple[int, int] | None:
    """(row, flat index) of an entry of `found`; None for -1.

    Example:
        >>> decode_nonfinite(3 * 2**40 + 17)
        (3, 17)
    """
    return None if found < 0 else (found >> _ROW_SHIFT, found & INDEX_MASK)


@torch.library.register_fake("pyvizllm::first_nonfinite_")
def _(tensors: list[Tensor], counts: Tensor, row: int, found: Tensor) -> None:
    return None
