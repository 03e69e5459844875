"""Parameters that the kernels of AdamW cannot step: torch's own implementation does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

from pyvizllm.ops.adamw import AdamWLists
from pyvizllm.optim.state import Work


def check_kernels_suffice(work: list[Work], collecting: bool) -> None:
    """Raise RuntimeError where clipping, skipping or collecting meets what only torch can step."""
    for part in work:
        if part.foreign:
            raise RuntimeError(
                "AdamW: expected dense real parameters on CPU or CUDA, and differentiable=False, "
                "for clipping, skipping and collecting; got a "
                f"{type(part.foreign[0]).__name__} of {part.foreign[0].dtype} "
                f"on {part.foreign[0].device}"
            )
    devices = {device for part in work for device in part.devices}
    if collecting and len(devices) > 1:
        raise RuntimeError(
            "AdamW: expected all parameters on one device for collecting, "
            f"got {sorted(map(str, devices))}"
        )


def step_with_torch(
    optimizer: torch.optim.AdamW, part: Work, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Step what the kernels cannot, as torch.optim.AdamW does."""
    group = {**part.group, "params": part.foreign}
    if grad_scale is not None or found_inf is not None:
        group.update(fused=True, foreach=False)  # torch's others know nothing of scales
    lists = AdamWLists()
    has_complex = optimizer._init_group(
        group,
        lists.params,
        lists.grads,
        lists.exp_avgs,
        lists.exp_avg_sqs,
        lists.max_exp_avg_sqs,
        lists.steps,
    )
    beta1, beta2 = group["betas"]
    adam(
        lists.params,
        lists.grads,
        lists.exp_avgs,
        lists.exp_avg_sqs,
        lists.max_exp_avg_sqs,
        lists.steps,
        grad_scale=grad_scale,
        found_inf=found_inf,
        has_complex=has_complex,
        decoupled_weight_decay=True,
        beta1=beta1,
        beta2=beta2,
        **{
            name: group[name]
            for name in (
                *("amsgrad", "lr", "weight_decay", "eps", "maximize"),
                *("foreach", "capturable", "differentiable", "fused"),
            )
        },
    )
