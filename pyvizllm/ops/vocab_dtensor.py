"""Losses of DTensors: logits, or the layer that makes them, sharded on the dimension of classes.

`torch.distributed.tensor` takes half a second to import: nothing here imports it before the caller
has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyvizllm.ops.cross_entropy_arguments import is_dtensor
from pyvizllm.ops.metrics import CrossEntropyMetrics
from pyvizllm.ops.vocab_parallel import vocab_parallel_cross_entropy
from pyvizllm.ops.vocab_parallel_linear import vocab_parallel_linear_cross_entropy

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def dtensor_cross_entropy(
    input: DTensor, target: Tensor, *arguments: Any, **options: Any
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """`vocab_parallel_cross_entropy` of logits sharded on their class dimension.

    Args:
        input: logits, [C], [N, C] or [N, C, d1, ...], sharded on C in one dimension of the mesh and
            replicated in all others.
        target: as `vocab_parallel_cross_entropy`'s, or a DTensor, which is gathered.
        arguments, options: the options of `vocab_parallel_cross_entropy`, without group and
            class_counts.

    Returns:
        The loss as a replicated DTensor; with `return_metrics` a pair of it and the metrics.

    Raises:
        ValueError: other placements; and what `vocab_parallel_cross_entropy` raises.
    """
    class_dim = 0 if input.dim() == 1 else 1
    where = _class_slices("input", input, class_dim)
    loss: Callable[..., Any] = vocab_parallel_cross_entropy
    result = loss(input.to_local(), _whole(target), *arguments, **options, **where)
    return _replicated(result, input)


def dtensor_linear_cross_entropy(
    input: Tensor,
    weight: DTensor,
    target: Tensor,
    bias: Tensor | None = None,
    *arguments: Any,
    **options: Any,
) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
    """`vocab_parallel_linear_cross_entropy` of a weight sharded on its rows.

    Args:
        input: hidden states, [..., H]: a tensor that is the same on all ranks, or a DTensor, which
            is gathered.
        weight: [C, H], sharded on C in one dimension of the mesh and replicated in all others.
        target: as `vocab_parallel_linear_cross_entropy`'s, or a DTensor, which is gathered.
        bias: [C], placed as the weight, or None.
        arguments, options: the options of `vocab_parallel_linear_cross_entropy`, without group and
            class_counts.

    Returns, raises: as `dtensor_cross_entropy`.
    """
    where = _class_slices("weight", weight, 0)
    local_bias = None
    if bias is not None:
        if not is_dtensor(bias) or bias.placements != weight.placements:
            placed = bias.placements if is_dtensor(bias) else "a tensor that is no DTensor"
            raise ValueError(
                f"vocab_parallel: expected bias placed as the weight {weight.placements}, "
                f"got {placed}"
            )
        local_bias = bias.to_local()
    loss: Callable[..., Any] = vocab_parallel_linear_cross_entropy
    result = loss(
        _whole(input), weight.to_local(), _whole(target), local_bias, *arguments, **options, **where
    )
    return _replicated(result, weight)


def _class_slices(name: str, tensor: DTensor, class_dim: int) -> dict[str, Any]:
    """The group and class_counts of a tensor sharded on `class_dim`."""
    mesh, classes = tensor.device_mesh, tensor.shape[class_dim]
    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not tensor.placements[sharded[0]].is_shard(class_dim):
        raise ValueError(
            f"vocab_parallel: expected {name} sharded on dimension {class_dim} (the classes) in "
            f"one dimension of the mesh and replicated in all others, got {tensor.placements}"
        )
    mesh_dim = sharded[0]
    # A group numbers its ranks in ascending order, slices are in the mesh's.
    if not bool((mesh.mesh.diff(dim=mesh_dim) > 0).all()):
        raise ValueError(
            "vocab_parallel: expected a mesh whose ranks ascend in the dimension that shards the "
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
