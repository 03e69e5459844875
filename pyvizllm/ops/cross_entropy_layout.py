"""How the kernels of cross_entropy get logits and targets: by rows, where they are if possible."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvizllm.ops.cross_entropy_arguments import is_soft


def has_positions(input: Tensor, target: Tensor, softcap: float, logit_scale: float) -> bool:
    """Whether a kernel takes logits [N, C, d1, ...] as they are, one position beside the next.

    The CPU's does, of class indices, without a cap or a scale. It pays where there is a vector of
    positions or more, which is not asked of what a compiler or an exporter leaves open.
    """
    if input.dim() < 3 or input.device.type != "cpu" or softcap != 0 or logit_scale != 1:
        return False
    if is_soft(input, target):
        return False
    step = 1
    for size, stride in zip(reversed(input.shape[2:]), reversed(input.stride()[2:]), strict=True):
        if stride != step and size != 1:
            return False
        step *= size
    return input.shape[1] > 0 and (torch.compiler.is_compiling() or step >= 16)


def as_rows(input: Tensor, target: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """Logits as [rows, C] with class stride 1; targets as a contiguous [rows], or likewise."""
    class_dim = 0 if input.dim() == 1 else 1
    rows = writable_rows(input, class_dim) if inplace else _rows_of(input, class_dim)
    if is_soft(input, target):
        return rows, _rows_of(target, class_dim)
    return rows, flat_indices(target)


def flat_indices(target: Tensor) -> Tensor:
    """[rows], contiguous, of a dtype that the kernels read."""
    if target.dtype == torch.uint8:
        target = target.long()
    if target.dim() != 1:
        target = target.reshape(-1)
    return target.contiguous()


def _rows_of(tensor: Tensor, class_dim: int) -> Tensor:
    """[rows, C] with class stride 1, where it is: a copy only if it has to be."""
    classes = tensor.shape[class_dim]
    rows = tensor
    if tensor.dim() != 2:
        # Not torch.Size.numel(), which an export would take for a constant.
        count = math.prod((*tensor.shape[:class_dim], *tensor.shape[class_dim + 1 :]))
        rows = tensor.movedim(class_dim, -1).reshape(count, classes)
    if rows.stride(1) != 1 and classes > 1:
        # Not contiguous(): where there are no rows, all strides are that to it.
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows


def writable_rows(input: Tensor, class_dim: int) -> Tensor:
    """Logits as [rows, C] in their own memory, where the gradient can be written over them."""
    rows = input
    try:
        if input.dim() != 2:
            rows = input.movedim(class_dim, -1).view(-1, input.shape[class_dim])
        one_place = rows.shape[1] <= 1 or rows.stride(1) == 1
    except RuntimeError:  # no view of the rows: they would have to be copied
        one_place = False
    if not one_place:
        raise ValueError(
            "cross_entropy: expected input with class stride 1 and rows one step apart for "
            f"inplace=True, got shape {list(input.shape)} with strides {list(input.stride())}"
        )
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(
            "cross_entropy: expected input whose rows share no memory for inplace=True, got shape "
            f"{list(input.shape)} with strides {list(input.stride())} (of expand? clone it first)"
        )
    return rows


def check_overwritable(input: Tensor) -> None:
    base = input._base  # what `input` is a view of
    if input.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise RuntimeError(
            "cross_entropy: expected inplace=True on logits that a model computed, got a leaf "
            "that requires grad (or a view of one), whose values would be lost"
        )
