"""What cross_entropy accepts, in torch's own error types and words."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

import torch
from torch import Tensor

from pyvizllm.ops.dtypes import FLOATING, INDICES

Reduction = Literal["none", "mean", "sum"]

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # else nobody has made one
    return module is not None and isinstance(value, module.DTensor)


torch_cross_entropy = torch.nn.functional.cross_entropy
"""torch's own, whatever is assigned in its place later."""


def is_soft(input: Tensor, target: Tensor) -> bool:
    """Whether the target is probabilities: it has the input's shape, as torch decides."""
    # An export would take from the shapes alone that the second sizes differ.
    return target.dim() == input.dim() and target.shape == input.shape


def overrides(value: object) -> bool:
    """Whether `value` has its own say in what torch's functions do with it."""
    if type(value) in (Tensor, torch.nn.Parameter, type(None)):
        return False
    own = getattr(type(value), "__torch_function__", None)
    default = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    return own not in (None, torch._C._disabled_torch_function_impl) and (
        getattr(own, "__func__", own) is not default
    )


def is_autocast_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_numbers(operation: str, **numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            raise TypeError(
                f"{operation}: expected {name} to be a number, got a tensor, whose gradient would "
                "be lost (multiply the logits instead)"
            )


def index_of(ignore_index: Any) -> int:
    """An int of what has the value of one, as torch takes it."""
    if isinstance(ignore_index, (int, torch.SymInt)) or not hasattr(ignore_index, "__index__"):
        return cast(int, ignore_index)
    try:
        return operator.index(ignore_index)
    except TypeError:
        return cast(int, ignore_index)  # check_options has the sentence


def check_options(
    operation: str,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    return_metrics: bool | str,
    fused: bool,
    inplace: bool,
) -> Reduction:
    """The reduction, of which torch has an old name."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(
            f"{operation}: expected ignore_index to be an int, got {ignore_index!r} "
            "(size_average and reduce of torch's signature are not here: pass what follows weight "
            "by its name)"
        )
    if reduction == "elementwise_mean":
        warnings.warn(
            "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.",
            stacklevel=3,
        )
        reduction = "mean"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"{operation}: expected reduction 'none', 'mean' or 'sum', got {reduction!r}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(
            f"{operation}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
        )
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{operation}: expected a finite softcap of at least 0, got {softcap}")
    if return_metrics not in (False, True, "per_token"):
        raise ValueError(
            f"{operation}: expected return_metrics False, True or 'per_token', "
            f"got {return_metrics!r}"
        )
    if inplace and not fused:
        raise ValueError(
            f"{operation}: expected fused=True with inplace=True (the gradient is written over "
            "the logits in the forward), got fused=False"
        )
    return cast(Reduction, reduction)


def check_tensors(
    operation: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> bool:
    """Raises what torch raises, under its conditions: types and layouts, then targets, weights.

    Returns whether the target is probabilities.
    """
    device = input.device if isinstance(input, Tensor) else None
    _check_tensor(operation, "input", input, device)
    _check_tensor(operation, "target", target, device)
    if weight is not None:
        _check_tensor(operation, "weight", weight, device)
    soft = is_soft(input, target)
    if soft:
        _check_probabilities(operation, input, target, ignore_index)
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{operation}: expected input of float32, float64, float16 or bfloat16, "
            f"got {input.dtype}"
        )
    if not soft:
        _check_target_shape(operation, input, target)
        if target.dtype not in INDICES:
            raise RuntimeError(
                f"{operation}: expected target dtype to be Long or Byte (or int32, which torch "
                f"does not take), but got {target.dtype}"
            )
    elif target.dtype not in FLOATING:
        raise NotImplementedError(
            f"{operation}: expected probabilities of float32, float64, float16 or bfloat16, "
            f"got {target.dtype}"
        )
    if weight is not None:
        _check_weight(operation, input, target, weight)
    return soft


def _check_tensor(operation: str, name: str, value: Any, device: torch.device | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operation}: expected {name} to be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else value.layout
        raise NotImplementedError(f"{operation}: expected a dense {name}, got {layout}")
    if value.device != device:  # the kernel would read memory that is not there
        raise RuntimeError(
            f"{operation}: expected {name} on input's device {device}, got {value.device}"
        )


def _check_probabilities(operation: str, input: Tensor, target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"{operation}: Expected floating point type for target with class probabilities "
            f"(a target of input's shape {list(input.shape)}), got {target.dtype}"
        )
    if input.dim() == 0:
        raise IndexError(f"{operation}: expected input of at least one dimension, got a scalar")
    if ignore_index >= 0:
        raise RuntimeError(
            f"{operation}: ignore_index is not supported for floating point target, "
            f"got {ignore_index}"
        )


def _check_target_shape(operation: str, input: Tensor, target: Tensor) -> None:
    if input.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError(
                f"{operation}: 0D or 1D target tensor expected for 1D input, got shape "
                f"{list(target.shape)}"
            )
        if target.dim() == 1 and target.shape[0] != 1:
            raise ValueError(
                f"{operation}: For 1D input, 1D target must have size 1, but got target size: "
                f"{target.shape[0]}"
            )
        return
    batch = target.shape[0] if target.dim() > 0 else 0
    if batch != input.shape[0]:
        raise ValueError(
            f"{operation}: Expected input batch_size ({input.shape[0]}) to match target "
            f"batch_size ({batch})."
        )
    expected = input.shape[:1] + input.shape[2:]
    if target.shape != expected:
        raise RuntimeError(
            f"{operation}: Expected target size {list(expected)} for input of shape "
            f"{list(input.shape)}, got {list(target.shape)}"
        )


def _check_weight(operation: str, input: Tensor, target: Tensor, weight: Tensor) -> None:
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"{operation}: weight tensor should be defined either for all {classes} classes or "
            f"no classes but got weight tensor of shape: {list(weight.shape)}"
        )
    if is_soft(input, target):
        if weight.is_complex():
            raise NotImplementedError(f"{operation}: expected real weight, got {weight.dtype}")
        return
    expected, got = dtype_under_autocast(input), dtype_under_autocast(weight)
    if expected != got:
        raise RuntimeError(
            f"{operation}: expected scalar type {_name(expected)} but found {_name(got)} "
            "(weight, with class indices, has to be of input's dtype)"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation}: not differentiable with respect to argument 'weight' with class "
            "indices. This input cannot have requires_grad True."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """What torch's autocast makes of an input of cross_entropy."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and is_autocast_on(tensor.device):
        return torch.float32
    return tensor.dtype


def result_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of the loss: of the product of probabilities, weights and log-softmax, if any."""
    dtype = dtype_under_autocast(input)
    if not is_soft(input, target):
        return dtype
    dtype = torch.promote_types(dtype, dtype_under_autocast(target))
    return dtype if weight is None else torch.promote_types(dtype, dtype_under_autocast(weight))
