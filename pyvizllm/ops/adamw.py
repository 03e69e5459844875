"""One step of AdamW over lists of tensors, as an operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.dtypes import wide_dtype


@dataclass
class AdamWLists:
    """The tensors of some parameters on one device: one entry a parameter in each list."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    """Empty without amsgrad."""
    masters: list[Tensor] = field(default_factory=list)
    """Float32 weights, an empty tensor where a parameter has none; or an empty list."""
    steps: list[Tensor] = field(default_factory=list)
    """Each [] float32: the steps taken."""


def adamw_(
    lists: AdamWLists,
    options: Mapping[str, Any],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_coefficient: Tensor | None = None,
    statistics: bool = False,
    update_histogram: Tensor | None = None,
    param_histogram: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take one step of AdamW on the `T` parameters of `lists`, in place.

    Args:
        lists: at least one parameter, and what belongs to it.
        options: lr, betas, eps, weight_decay and maximize of a parameter group of torch's AdamW.
        grad_scale: [] float32; gradients are divided by it.
        found_inf: [] float32; other than 0: nothing is changed.
        clip_coefficient: [] float64; gradients are multiplied by it.
        statistics: whether to return any.
        update_histogram, param_histogram: [T, 4096] int64, added to.

    Returns:
        Values [7, T] float64 and counts [5, T] int64 of the update, and of the parameters after
        the step, as in `TensorStats`; [7, 0] and [5, 0] without `statistics`.
    """
    lr, (beta1, beta2) = options["lr"], options["betas"]
    lr_tensor: Tensor | None = None
    if isinstance(lr, Tensor):
        lr_tensor, lr = _scalar_on(lists.params[0].device, lr)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.pyvizllm.adamw_(
        lists.params,
        lists.grads,
        lists.exp_avgs,
        lists.exp_avg_sqs,
        lists.max_exp_avg_sqs,
        lists.masters,
        lists.steps,
        lr_tensor,
        lr,
        float(beta1),  # sync point, of betas given as tensors of a GPU
        float(beta2),  # sync point
        options["eps"],
        options["weight_decay"],
        options["maximize"],
        grad_scale,
        found_inf,
        clip_coefficient,
        statistics,
        update_histogram,
        param_histogram,
    )
    # As an operation of torch's does: who saved a parameter for its backward now finds it changed.
    increment_version([param for param in lists.params if not param.is_inference()])
    return result


def _scalar_on(device: torch.device, lr: Tensor) -> tuple[Tensor | None, float]:
    """A learning rate for the kernel to read; one on the host, for a GPU, is read here."""
    if lr.is_cpu and device.type != "cpu":
        return None, float(lr)
    return lr.to(device, wide_dtype(lr.dtype), non_blocking=device.type != "cpu"), 0.0


@torch.library.register_fake("pyvizllm::adamw_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_coefficient: Tensor | None,
    statistics: bool,
    update_histogram: Tensor | None,
    param_histogram: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(params) if statistics else 0
    first = params[0]
    return (
        first.new_empty((7, count), dtype=torch.float64),
        first.new_empty((5, count), dtype=torch.int64),
        first.new_empty((7, count), dtype=torch.float64),
        first.new_empty((5, count), dtype=torch.int64),
    )
