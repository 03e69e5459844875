"""The state of AdamW's parameters, laid out as torch's: made, gathered into lists, and loaded."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pyvizllm.ops.adamw import AdamWLists

State = MutableMapping[Tensor, dict[str, Any]]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass
class Work:
    """What one parameter group brings to a step."""

    group: dict[str, Any]
    devices: dict[torch.device, AdamWLists] = field(default_factory=dict)
    foreign: list[Tensor] = field(default_factory=list)
    """Parameters that only torch's own implementation can step."""


def is_ours(param: Tensor) -> bool:
    """Whether the kernels can step it: dense memory of a real dtype, on CPU or CUDA."""
    plain = type(param) is Parameter or type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and param.dtype in _DTYPES and param.device.type in ("cpu", "cuda")


def _refuse_capture(param: Tensor) -> None:
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "AdamW: expected a first step before the capture of a CUDA graph, got a parameter "
            "without state: the graph would make it again at each replay"
        )


class StateKeeper:
    """Makes the state of new parameters, and gathers it for the kernels.

    Moments are of `moments_dtype` for bfloat16 and float16 parameters, else of the parameter's
    dtype. With `master_weights`, those parameters have a float32 "master" in their state.
    """

    def __init__(self, moments_dtype: torch.dtype | None, master_weights: bool) -> None:
        self.moments_dtype = moments_dtype
        self.master_weights = master_weights
        self._placeholders: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def gather(self, group: dict[str, Any], state: State, every_row: bool) -> Work:
        """List the group's parameters that have a gradient; with `every_row`, a row for each."""
        work = Work(group)
        amsgrad, differentiable = group["amsgrad"], group["differentiable"]
        device, lists = torch.device("meta"), AdamWLists()  # until the first parameter comes
        for param in group["params"]:
            grad = param.grad
            if grad is None and not every_row:
                continue
            if differentiable or not is_ours(param):
                work.foreign.append(param)
                continue
            if param.device != device:
                device = param.device
                lists = work.devices.setdefault(device, AdamWLists())
            if grad is None:
                self._add_placeholder(device, lists, amsgrad)
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    "Adam does not support sparse gradients, please consider SparseAdam instead"
                )
            own = state[param]
            if not own:
                self._begin(param, own, amsgrad)
            lists.params.append(param)
            lists.grads.append(grad)
            lists.exp_avgs.append(own["exp_avg"])
            lists.exp_avg_sqs.append(own["exp_avg_sq"])
            lists.steps.append(own["step"])
            if amsgrad:
                lists.max_exp_avg_sqs.append(own["max_exp_avg_sq"])
            if self.master_weights:
                lists.masters.append(self._master(param, own))
        return work

    def _begin(self, param: Tensor, own: dict[str, Any], amsgrad: bool) -> None:
        _refuse_capture(param)
        own["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name in MOMENTS[: 3 if amsgrad else 2]:
            own[name] = torch.zeros_like(
                param, dtype=self.moment_dtype(param), memory_format=torch.preserve_format
            )

    def moment_dtype(self, param: Tensor) -> torch.dtype:
        """The dtype of the parameter's moments."""
        if self.moments_dtype is not None and param.dtype in _LOW_PRECISION:
            return self.moments_dtype
        return param.dtype

    def _master(self, param: Tensor, own: dict[str, Any]) -> Tensor:
        if param.dtype not in _LOW_PRECISION:
            return self._placeholder(param.device)[0]
        if "master" not in own:  # new, or loaded from an optimizer without
            _refuse_capture(param)
            own["master"] = param.detach().to(torch.float32, memory_format=torch.preserve_format)
        master: Tensor = own["master"]
        return master

    def _placeholder(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """An empty tensor, and a step that nobody reads."""
        if device not in self._placeholders:
            empty = torch.empty(0, dtype=torch.float32, device=device)
            self._placeholders[device] = empty, empty.new_zeros(())
        return self._placeholders[device]

    def _add_placeholder(self, device: torch.device, lists: AdamWLists, amsgrad: bool) -> None:
        """Keep the row of a parameter without a gradient."""
        empty, step = self._placeholder(device)
        for tensors in (lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs):
            tensors.append(empty)
        if amsgrad:
            lists.max_exp_avg_sqs.append(empty)
        if self.master_weights:
            lists.masters.append(empty)
        lists.steps.append(step)

    def load(self, groups: list[dict[str, Any]], state: State, state_dict: dict[str, Any]) -> None:
        """Correct what torch has just loaded from `state_dict`.

        torch casts all of a parameter's state but the step to the parameter's dtype, and leaves the
        step on the CPU unless the optimizer it came from was fused or capturable.
        """
        params = [param for group in groups for param in group["params"]]
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for param, index in zip(params, saved_ids, strict=True):
            saved = state_dict["state"].get(index)
            if not saved or not is_ours(param):
                continue
            own = state[param]
            for name in (*MOMENTS, "master"):
                if name in saved:
                    if saved[name].shape != param.shape:
                        raise ValueError(
                            f"AdamW.load_state_dict: expected {name} of shape {list(param.shape)}, "
                            f"got {list(saved[name].shape)}"
                        )
                    dtype = torch.float32 if name == "master" else self.moment_dtype(param)
                    own[name] = saved[name].to(device=param.device, dtype=dtype)
            if not self.master_weights:
                own.pop("master", None)
            step = torch.as_tensor(saved["step"], dtype=torch.float32)
            own["step"] = step.to(param.device)
