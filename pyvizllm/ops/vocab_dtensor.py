"""Losses of DTensors: logits, or the layer that makes them, sharded on the dimension of classes.

`torch.distributed.tensor` takes half a second to import: nothing here imports it before the caller
has.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from pyvizllm.ops.cross_entropy_arguments import Reduction, is_dtensor, torch_cross_entropy
from pyvizllm.ops.metrics import CrossEntropyMetrics
from pyvizllm.ops.vocab_parallel import vocab_parallel_cross_entropy
from pyvizllm.ops.vocab_parallel_linear import vocab_parallel_linear_cross_entropy

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LINEAR = "linear_cross_entropy"


def dtensor_cross_entropy(
    operation: str,
    input: DTensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    label_smoothing: float,
    *,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_metrics: bool | Literal["per_token"],
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """`vocab_parallel_cross_entropy` of logits sharded on their class dimension.

    Torch's own function of others, and of what the vocabulary-parallel loss has no answer to (class
    weights, probabilities), unless options ask for more than torch has.

    Args:
        operation: whose name errors have.
        input: logits, [C], [N, C] or [N, C, d1, ...].
        target: as `vocab_parallel_cross_entropy`'s, or a DTensor, which is gathered.
        others: as `cross_entropy`'s.

    Returns:
        The loss as a DTensor, replicated; with `return_metrics` a pair of it and the metrics.

    Raises:
        ValueError, NotImplementedError: options that torch does not have, with other placements, or
            with class weights; and what `vocab_parallel_cross_entropy` raises.
    """
    class_dim = 0 if input.dim() == 1 else 1
    more = z_loss != 0 or softcap != 0 or logit_scale != 1 or bool(return_metrics)
    possible = weight is None and not target.is_floating_point()
    if not more and not (possible and _are_classes_sharded(input, class_dim)):
        return torch_cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if weight is not None:
        raise NotImplementedError(
            f"{operation}: expected no class weights for logits that are a DTensor, with options "
            "that torch's function does not have, got some"
        )
    where = _class_slices(operation, "logits", input, class_dim)
    result = vocab_parallel_cross_entropy(
        input.to_local(),
        _whole(target),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        return_metrics=return_metrics,
        **where,
    )
    return _replicated(result, input)


def dtensor_linear_cross_entropy(
    input: Tensor,
    weight: DTensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *,
    chunk_size: int | None,
    **options: Any,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """`vocab_parallel_linear_cross_entropy` of a weight sharded on its rows.

    Of another weight, and with class weights, the cross-entropy of the linear layer's output.

    Args:
        input: hidden states, [..., H]: a DTensor, which is gathered.
        weight: [C, H].
        target: as `vocab_parallel_linear_cross_entropy`'s, or a DTensor, which is gathered.
        bias: [C], placed as the weight, or None.
        others: as `linear_cross_entropy`'s, all of them.

    Returns, raises: as `dtensor_cross_entropy`; and TypeError for an input that is no DTensor:
        a weight may be sharded on its rows without all ranks having the same tokens.
    """
    if not is_dtensor(input):
        raise TypeError(
            f"{_LINEAR}: expected input to be a DTensor, as the weight is, got "
            f"{type(input).__name__} (tensors that are the same on all ranks, with a slice of the "
            "weight: vocab_parallel_linear_cross_entropy)"
        )
    probabilities = target.is_floating_point()
    if class_weight is not None or probabilities or not _are_classes_sharded(weight, 0):
        logits = torch.nn.functional.linear(input, weight, bias)
        logits = cast("DTensor", logits.reshape(-1, logits.shape[-1]))
        flat = target.reshape(-1, target.shape[-1]) if probabilities else target.reshape(-1)
        return dtensor_cross_entropy(_LINEAR, logits, flat, class_weight, **options)
    where = _class_slices(_LINEAR, "weight", weight, 0)
    local_bias = None
    if bias is not None:
        if not is_dtensor(bias) or bias.placements != weight.placements:
            placed = bias.placements if is_dtensor(bias) else "a tensor that is no DTensor"
            raise ValueError(
                f"{_LINEAR}: expected bias placed as the weight {weight.placements}, got {placed}"
            )
        local_bias = bias.to_local()
    result = vocab_parallel_linear_cross_entropy(
        _whole(input),
        weight.to_local(),
        _whole(target),
        local_bias,
        chunk_size=chunk_size,
        **options,
        **where,
    )
    return _replicated(result, weight)


def _are_classes_sharded(tensor: DTensor, class_dim: int) -> bool:
    """In one dimension of the mesh, and nothing else in any."""
    sharded = [placement for placement in tensor.placements if not placement.is_replicate()]
    return len(sharded) == 1 and sharded[0].is_shard(class_dim)


def _class_slices(operation: str, name: str, tensor: DTensor, class_dim: int) -> dict[str, Any]:
    """The group and class_counts of a tensor sharded on `class_dim`."""
    mesh, classes = tensor.device_mesh, tensor.shape[class_dim]
    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not _are_classes_sharded(tensor, class_dim):
        raise ValueError(
            f"{operation}: expected {name} sharded on dimension {class_dim} (the classes) in "
            f"one dimension of the mesh and replicated in all others, got {tensor.placements}"
        )
    mesh_dim = sharded[0]
    # A group numbers its ranks in ascending order, slices are in the mesh's, which the CPU has.
    if not bool((mesh.mesh.diff(dim=mesh_dim) > 0).all()):
        raise ValueError(
            f"{operation}: expected a mesh whose ranks ascend in the dimension that shards the "
            f"classes, got {mesh.mesh.tolist()}"
        )
    size = mesh.size(mesh_dim)
    chunk = (classes + size - 1) // size  # DTensor's rule: torch.chunk's
    counts = [max(0, min(chunk, classes - rank * chunk)) for rank in range(size)]
    return {"group": mesh.get_group(mesh_dim), "class_counts": counts}


def _whole(tensor: Any) -> Any:
    """The local tensor of all its values; the gradient of a replicated one is the same."""
    if not is_dtensor(tensor):
        return tensor
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    return tensor.redistribute(placements=[replicate] * tensor.device_mesh.ndim).to_local()


def _replicated(
    result: Tensor | tuple[Tensor, CrossEntropyMetrics], like: DTensor
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    module = sys.modules["torch.distributed.tensor"]
    loss, *metrics = result if isinstance(result, tuple) else (result,)
    mesh = like.device_mesh
    loss = module.DTensor.from_local(loss, mesh, [module.Replicate()] * mesh.ndim, run_check=False)
    return (loss, metrics[0]) if metrics else loss
