"""What the losses of a linear layer accept."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvizllm.ops.cross_entropy_arguments import is_autocast_on
from pyvizllm.ops.dtypes import FLOATING, INDICES


def check_layer(
    operation: str,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raises where the tensors of a linear layer and its loss do not fit together."""
    tensors = {"input": input, "weight": weight, "target": target}
    given = {"bias": bias, "class_weight": class_weight}
    optional = {name: value for name, value in given.items() if value is not None}
    for name, value in (tensors | optional).items():
        _check_tensor(operation, name, value, input)
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{operation}: expected input [..., H] and weight [C, H], "
            f"got {list(input.shape)} and {list(weight.shape)}"
        )
    for name, value in optional.items():
        if value.shape != weight.shape[:1]:
            raise ValueError(
                f"{operation}: expected {name} of shape {list(weight.shape[:1])}, "
                f"got {list(value.shape)}"
            )
    classes = weight.shape[:1] if target.is_floating_point() else ()
    expected = [*input.shape[:-1], *classes]
    if list(target.shape) != expected:
        raise ValueError(
            f"{operation}: expected target of shape {expected} for input of shape "
            f"{list(input.shape)}, got {list(target.shape)}"
        )
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(
            f"{operation}: expected an int chunk_size of at least 1, or None, got {chunk_size!r}"
        )


def _check_tensor(operation: str, name: str, value: Tensor, input: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operation}: expected {name} to be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{operation}: expected a dense {name}, got {layout}")
    if value.dtype not in FLOATING and not (name == "target" and value.dtype in INDICES):
        kinds = " (or int64, int32, uint8)" if name == "target" else ""
        raise TypeError(
            f"{operation}: expected {name} of float32, float64, float16 or bfloat16"
            f"{kinds}, got {value.dtype}"
        )
    if value.device != input.device:
        raise ValueError(
            f"{operation}: expected {name} on input's device {input.device}, got {value.device}"
        )


def product_dtype(
    operation: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> torch.dtype:
    """In which the layer's output is computed: the input's, or autocast's."""
    if is_autocast_on(input.device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise ValueError(
                f"{operation}: expected {name} of input's dtype {input.dtype}, got {tensor.dtype}"
            )
    return input.dtype
