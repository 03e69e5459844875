"""Gradient clipping by the norm that one read of the gradients measures, statistics included."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Literal, Protocol, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyvizllm.ops.dtypes import FLOATING
from pyvizllm.ops.tensor_stats import TensorStats, tensor_stats


class GradientObserver(Protocol):
    """Sees gradients that are about to be clipped."""

    def before_clipping(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor | None:
        """Called before the gradients of `parameters` are scaled; must not change them.

        Returns:
            Their Euclidean norm [] float64, if it has measured exactly these gradients, which
            spares another read of them; else None. What it raises, `clip_grad_norm_` raises.
        """


# A dictionary, as threads come to and leave it while others clip: one operation copies it.
observers: dict[GradientObserver, None] = {}
"""Called by `clip_grad_norm_`, each before any gradient is changed."""


@overload
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = ...,
    error_if_nonfinite: bool = ...,
    foreach: bool | None = ...,
    *,
    return_statistics: Literal[False] = ...,
    histogram: bool | Tensor = ...,
) -> Tensor: ...
@overload
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = ...,
    error_if_nonfinite: bool = ...,
    foreach: bool | None = ...,
    *,
    return_statistics: Literal[True],
    histogram: bool | Tensor = ...,
) -> tuple[Tensor, TensorStats]: ...
@overload
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = ...,
    error_if_nonfinite: bool = ...,
    foreach: bool | None = ...,
    *,
    return_statistics: bool,
    histogram: bool | Tensor = ...,
) -> Tensor | tuple[Tensor, TensorStats]: ...


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    return_statistics: bool = False,
    histogram: bool | Tensor = True,
) -> Tensor | tuple[Tensor, TensorStats]:
    """Scales gradients in place so that their norm is at most `max_norm`: a drop-in for
    `torch.nn.utils.clip_grad_norm_`.

    The gradients are read once, summed in float64 and multiplied by
    `min(1, max_norm / (norm + 1e-6))`, the same bits as torch's product. Where that is 1 they are
    not touched: the device decides, and the host waits for nothing. What this does not know (norms
    other than 2 and inf, sparse and distributed gradients, other dtypes and devices) torch does.

    Args:
        parameters: tensors of any shapes, or one; those without a gradient are passed over.
        max_norm: the largest norm that is left alone.
        norm_type: the order of the norm; 'inf' is the largest magnitude.
        error_if_nonfinite: whether to wait for the norm and to raise where it is NaN or infinite.
        foreach: as in torch; the kernels here always take the whole list.
        return_statistics: whether to return the gradients' statistics from before clipping too.
        histogram: with `return_statistics`, whether to count as well, or a contiguous int64 tensor
            [T, 4096] to add the counts to, T being the number of parameters with a gradient.

    Returns:
        The norm [] of all gradients together, in the dtype of torch's (what the gradients' dtypes
        promote to), on the first gradient's device; 0 where there is no gradient. With
        `return_statistics` a pair: the norm and a `TensorStats` of the T gradients.

    Raises:
        RuntimeError: if `error_if_nonfinite` and the norm is not finite; no gradient is changed.
        TypeError, ValueError: with `return_statistics`, where `tensor_stats` would: for sparse
            gradients, for several devices, or where there is no gradient.

    Example:
        >>> norm, stats = clip_grad_norm_(model.parameters(), 1.0, return_statistics=True)
    """
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn(  # torch's words
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=3,  # torch.no_grad is between
            )
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm_type = float(norm_type)
    stats = tensor_stats(gradients, histogram=histogram) if return_statistics else None
    seen = [observer.before_clipping(parameters, max_norm) for observer in tuple(observers)]
    known = next((norm for norm in seen if norm is not None), None)
    if _is_ours(gradients, norm_type, foreach):
        if norm_type != 2.0:
            known = None
        total_norm = _total_norm(gradients, norm_type, stats, known)
        if error_if_nonfinite and not torch.isfinite(total_norm):  # sync point
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from "
                "`parameters` is non-finite, so it cannot be clipped. To disable "
                "this error and scale the gradients by the non-finite norm anyway, "
                "set `error_if_nonfinite=False`"
            )
        _scale(gradients, torch.clamp(float(max_norm) / (total_norm + 1e-6), max=1.0))
    else:
        total_norm = torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
    return total_norm if stats is None else (total_norm, stats)


def _is_ours(gradients: list[Tensor], norm_type: float, foreach: bool | None) -> bool:
    """Whether these gradients and this norm are what the kernels here are for."""
    if norm_type not in (2.0, math.inf) or not gradients:
        return False
    if not all(
        type(g) in (Tensor, torch.nn.Parameter)
        and g.layout == torch.strided
        and g.dtype in FLOATING
        and g.device.type in ("cpu", "cuda")
        and (norm_type == 2.0 or g.numel() > 0)  # torch: no largest magnitude of nothing
        for g in gradients
    ):
        return False
    # Memory that two gradients share is scaled twice by torch, one after the other.
    memory = [g.data_ptr() for g in gradients if g.numel() > 0]
    return len(set(memory)) == len(memory)


def _by_device(gradients: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device, []).append(gradient)
    return groups


def _total_norm(
    gradients: list[Tensor], norm_type: float, stats: TensorStats | None, known: Tensor | None
) -> Tensor:
    """[] in the dtype to which the gradients' dtypes promote, on the first one's device."""
    if stats is not None:
        parts = [stats]
    elif known is None:
        parts = [tensor_stats(group, histogram=False) for group in _by_device(gradients).values()]
    else:
        parts = []
    norms = [part.total_norm if norm_type == 2.0 else part.abs_max.max() for part in parts]
    norm = norms[0] if known is None or norms else known.to(gradients[0].device)
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack([n.to(norm.device) for n in norms]), norm_type)
    return norm.to(reduce(torch.promote_types, [gradient.dtype for gradient in gradients]))


def _scale(gradients: list[Tensor], coefficient: Tensor) -> None:
    """Multiply in place, where the coefficient is not 1."""
    for device, group in _by_device(gradients).items():
        factor = coefficient.to(device)
        flat = [gradient for gradient in group if _is_flat(gradient)]
        if flat:
            torch.ops.pyvizllm.scale_(flat, factor.double())
            increment_version(flat)
        for gradient in group:
            if not _is_flat(gradient):
                gradient.mul_(factor)


def _is_flat(gradient: Tensor) -> bool:
    """Whether it is memory without gaps, which holds the values themselves (not negated ones)."""
    return gradient.is_contiguous() and not gradient.is_neg()


@torch.library.register_fake("pyvizllm::scale_")
def _(tensors: list[Tensor], coefficient: Tensor) -> None:
    return None
