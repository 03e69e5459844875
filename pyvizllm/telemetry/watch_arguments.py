"""What `pyvizllm.watch` and `Watch.log` accept, and a sentence for all else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from pyvizllm.ops import CrossEntropyMetrics
from pyvizllm.ops.cross_entropy_arguments import is_dtensor
from pyvizllm.telemetry.diagnosis import descriptions
from pyvizllm.telemetry.records import KINDS, Kind
from pyvizllm.telemetry.shards import part_of
from pyvizllm.telemetry.sinks import Sink

_NUMBERS = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def json_block(value: object) -> str:
    """`value` as JSON that TensorBoard shows as it is: a block of code in Markdown."""
    try:
        lines = json.dumps(value, indent=2, default=str).splitlines()
    except (TypeError, ValueError) as error:  # a key that is a tuple; a cycle
        raise TypeError(f"watch: expected config that JSON can hold: {error}") from error
    return "\n".join("    " + line for line in lines)


def ignored_rules(ignore: object, operation: str) -> frozenset[str]:
    """`ignore` as a set, if it names rules of the diagnosis: one, several, or None for none."""
    names = [ignore] if isinstance(ignore, str) else () if ignore is None else ignore
    known = descriptions()
    wanted = f"{operation}: expected ignore to name rules, of " + ", ".join(known)
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{wanted}; got {ignore!r}")
    if unknown := sorted(set(names) - known.keys()):
        raise ValueError(f"{wanted}; got {', '.join(unknown)}")
    return frozenset(names)


def scalar(name: object, value: object, operation: str) -> float | Tensor:
    """`value`, if it is a real number; a tensor is not read."""
    if not isinstance(name, str):
        raise TypeError(f"{operation}: expected names that are strings, got {name!r}")
    if isinstance(value, Tensor) and not _is_readable(value):
        raise TypeError(
            f"{operation}: expected {name} to be a dense tensor of real numbers, got one of "
            f"{value.layout}, {value.dtype} on {value.device}"
        )
    if is_dtensor(value):
        if not all(placement.is_replicate() for placement in value.placements):
            raise TypeError(
                f"{operation}: expected {name} to be whole on each process, got a DTensor of "
                f"{value.placements}; log {name}.full_tensor(), in all processes"
            )
        value = part_of(value.detach())
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) != 1:
        raise ValueError(
            f"{operation}: expected {name} of one element, got shape {list(value.shape)}"
        )
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        value = value.item()
    if not isinstance(value, (Real, np.bool_)):
        raise TypeError(
            f"{operation}: expected {name} to be a real number or a tensor of one, got "
            f"{type(value).__name__}"
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{operation}: expected {name} to be a number that a float holds"
        ) from None


def named_values(values: object, more: Mapping[str, object]) -> dict[str, object]:
    """The values of a log by their names, which `scalar` checks."""
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(
            "Watch.log: expected values by name, as in log(loss=loss), or a mapping of them, got "
            f"{type(values).__name__}"
        )
    return {**(values or {}), **more}


def kinds(histograms: object) -> tuple[Kind, ...]:
    """The kinds to count; one may be given as it is."""
    asked = (histograms,) if isinstance(histograms, str) else histograms
    if not isinstance(asked, Sequence) or any(kind not in KINDS for kind in asked):
        raise ValueError(f"watch: expected histograms to be some of {KINDS}, got {histograms!r}")
    return tuple(asked)


def count(name: str, value: object, operation: str) -> int | Tensor:
    """`value`, if it is a whole number; a tensor is not read."""
    if isinstance(value, Tensor) and _is_readable(value) and value.numel() == 1:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{operation}: expected {name} to be an int or a tensor of one, got {value!r}"
        )
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{operation}: expected {name} of 64 bits, got {value}")
    return int(value)


def loss_metrics(metrics: object) -> CrossEntropyMetrics:
    """`metrics`, if those are what is expected."""
    if not isinstance(metrics, CrossEntropyMetrics):
        raise TypeError(
            "Watch.log_metrics: expected the CrossEntropyMetrics that a loss of pyvizllm returns, "
            f"got {type(metrics).__name__}"
        )
    return metrics


def plain_ids(ids: object, depth: int = 4) -> object:
    """A copy of sample ids that JSON can hold once tensors are read: nobody else changes it."""
    if ids is None or isinstance(ids, (str, int, float)):
        return ids
    if isinstance(ids, Tensor) and _is_readable(ids):
        return ids.detach().clone()
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "biufU":
        return ids.copy()
    if isinstance(ids, np.generic) and ids.dtype.kind in "biufU":
        return ids.item()
    if depth and isinstance(ids, Mapping):
        return {str(name): plain_ids(each, depth - 1) for name, each in ids.items()}
    if depth and isinstance(ids, (list, tuple, set, frozenset, range)):
        return [plain_ids(each, depth - 1) for each in ids]
    return repr(ids)


def _is_readable(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_nested
    return plain and tensor.dtype in _NUMBERS and tensor.device.type != "meta"


def optimizers_of(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]
) -> Sequence[Optimizer]:
    many = isinstance(optimizer, Sequence)
    optimizers = cast("Sequence[Optimizer]", optimizer if many else [optimizer])
    if not optimizers or len({id(each) for each in optimizers}) < len(optimizers):
        raise ValueError(f"watch: expected optimizers, each once, got {len(optimizers)} of them")
    trained = set(model.parameters())
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(
                f"watch: expected torch.optim.Optimizer objects, got {type(each).__name__}"
            )
        if not hasattr(hooked(each), "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"watch: expected optimizers that call step hooks, got {type(each).__name__}, "
                "whose __init__ does not call Optimizer's; give the one that it wraps"
            )
        if not any(p in trained for group in each.param_groups for p in group["params"]):
            raise ValueError(
                f"watch: expected optimizers over the model's parameters, got "
                f"{type(each).__name__} over none of them"
            )
    return [hooked(each) for each in optimizers]


def hooked(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step calls hooks: what `optimizer` wraps where it has none of its own.

    So do wrappers, as Accelerate's, that derive from Optimizer without being set up as one.
    """
    while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def check_model(model: object, operation: str) -> None:
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"{operation}: expected model of type nn.Module, got {got}")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ValueError(
            f"{operation}: expected a model whose parameters have shapes, got a lazy module that "
            "has not seen a batch yet (call the model on one first)"
        )


def check(
    model: object,
    logdir: object,
    every: object,
    max_overhead: object,
    max_tags: object,
    start_step: object,
    hparams: object,
    sinks: object,
) -> None:
    check_model(model, "watch")
    for name, value, least in (
        ("every", every, 1),
        ("max_tags", max_tags, 1),
        ("start_step", start_step, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"watch: expected {name} to be an int, got {value!r}")
        if value < least:
            raise ValueError(f"watch: expected {name} of at least {least}, got {value}")
        if int(value) >= 2**63:
            raise ValueError(f"watch: expected {name} of 64 bits, got {value}")
    if logdir is not None and not isinstance(logdir, (str, os.PathLike)):
        raise TypeError(f"watch: expected logdir to be a path, got {logdir!r}")
    if max_overhead is not None and not isinstance(max_overhead, Real):
        raise TypeError(f"watch: expected max_overhead to be a number, got {max_overhead!r}")
    if max_overhead is not None and not 0 < float(max_overhead) < 1:
        raise ValueError(
            f"watch: expected max_overhead above 0 and below 1, or None, got {max_overhead}"
        )
    if not isinstance(sinks, Sequence) or not all(isinstance(sink, Sink) for sink in sinks):
        raise TypeError(f"watch: expected sinks to be a list of them, got {sinks!r}")
    if hparams is None:
        return
    if not isinstance(hparams, Mapping):
        raise TypeError(f"watch: expected hparams to be a mapping, got {type(hparams).__name__}")
    for name, value in hparams.items():
        if not isinstance(name, str) or not isinstance(value, (Real, str)):
            raise TypeError(
                "watch: expected names of hparams with a number or a string each, got "
                f"{name!r}: {value!r}"
            )
        if isinstance(value, Real):
            scalar(f"hparams[{name!r}]", value, "watch")
