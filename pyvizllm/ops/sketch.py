"""A +-1 hash sketch of each of a list of tensors: distances and angles in 64 numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.tensor_stats import check_tensors

SKETCH_SIZE = 64


def sketch(tensors: Iterable[Tensor], *, seeds: Sequence[int] | None = None) -> Tensor:
    """Projects each tensor at random on 64 numbers, in one read.

    The projection is linear, and products survive it on average: for two tensors of one shape and
    seed, `(S(x) * S(y)).sum()` is an unbiased estimate of `(x * y).sum()`, and so
    `(S(x) - S(y)).norm()` tells how far x moved to y. The squared norm has a relative standard
    deviation of sqrt(2 / 64) = 18 % for one tensor, and less for several, whose estimates are
    independent: their squared norms add. It is a count sketch (Charikar, Chen and Farach-Colton,
    2002) with the signs of Alon, Matias and Szegedy (1996).

    Args:
        tensors: at least one tensor; any shapes, also empty, of float32, float64, float16 or
            bfloat16, mixed as you like, all on one device. A tensor that is not contiguous is
            copied first.
        seeds: one number a tensor, which chooses its signs; None for 0, 1, 2, ... Sketches can be
            compared, added and subtracted where seed and shape are the same.

    Returns:
        [T, 64] float64, on the tensors' device, without gradients. The same bits for any number of
        threads; CPU and CUDA agree to the rounding of float32 sums.

    Raises:
        TypeError: if `tensors` is no list, or something in it is no tensor, or sparse or quantized.
        ValueError: if the list is empty, or `seeds` has another length.

    Example:
        >>> start = sketch(model.parameters())
        >>> distance = (sketch(model.parameters()) - start).norm()
    """
    tensors = check_tensors("sketch", tensors)
    seeds = range(len(tensors)) if seeds is None else seeds
    if len(seeds) != len(tensors):
        raise ValueError(
            f"sketch: expected a seed for each of {len(tensors)} tensors, got {len(seeds)}"
        )
    with torch.no_grad():
        result: Tensor = torch.ops.pyvizllm.sketch(tensors, list(seeds))
    return result


@torch.library.register_fake("pyvizllm::sketch")
def _(tensors: list[Tensor], seeds: list[int]) -> Tensor:
    return tensors[0].new_empty((len(tensors), SKETCH_SIZE), dtype=torch.float64)
