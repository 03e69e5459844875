"""What a batch costs: the loss of its counted targets, as a sum, and how many those are.

Sums and not means, so that micro-batches with unequal numbers of targets add up to what one big
batch would give: loss = (sum over all micro-batches) / (targets of all micro-batches).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy
from pyvizllm.training.config import TrainConfig

__all__ = ["CrossEntropyObjective", "LossFunction", "Objective", "UserObjective", "to_device"]

LossFunction = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, CrossEntropyMetrics]"]


class Objective(Protocol):
    def count(self, batch: Any) -> Tensor:
        """Weight of the batch before the forward: a 0-dim int64 tensor on the batch's device."""

    def __call__(
        self, model: nn.Module, batch: Any, count: Tensor
    ) -> tuple[Tensor, CrossEntropyMetrics | None]:
        """(loss summed over the counted targets [], metrics where there are any)."""


class CrossEntropyObjective:
    """Our cross_entropy over batches (inputs, targets)."""

    def __init__(self, config: TrainConfig) -> None:
        self.ignore_index = config.ignore_index
        self.label_smoothing = config.label_smoothing_factor
        self.z_loss = config.z_loss

    def count(self, batch: Any) -> Tensor:
        _, targets = _pair(batch)
        return (targets != self.ignore_index).sum()

    def __call__(
        self, model: nn.Module, batch: Any, count: Tensor
    ) -> tuple[Tensor, CrossEntropyMetrics | None]:
        inputs, targets = _pair(batch)
        logits, targets = _align(_logits(model(inputs)), targets)
        low = logits.dtype in (torch.bfloat16, torch.float16)
        # Under autocast the loss of 16-bit logits is float32. Without it the loss, and with it the
        # factor 1 / targets that comes back through it, would be rounded to 16 bits.
        with torch.autocast(logits.device.type, logits.dtype) if low else nullcontext():
            loss, metrics = cross_entropy(
                logits,
                targets,
                ignore_index=self.ignore_index,
                reduction="sum",
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
                return_metrics=True,
                # The one place that chooses: writing the gradient over the logits is only right
                # where nothing else reads them, and an unknown model does not tell us.
                fused=False,
            )
        return loss, metrics


class UserObjective:
    """A user's loss_fn(model, batch): the mean loss of a batch, weighted by the batch's targets.

    The targets that count: those that are not ignore_index in the second of a pair, or in
    batch["labels"]; in a batch of another form, or with targets of floating point, its examples
    (the length of its first tensor).
    """

    def __init__(self, loss_fn: LossFunction, config: TrainConfig) -> None:
        self.loss_fn, self.ignore_index = loss_fn, config.ignore_index

    def count(self, batch: Any) -> Tensor:
        targets = None
        if isinstance(batch, Mapping):
            targets = batch.get("labels")
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            targets = batch[1]
        if isinstance(targets, Tensor) and not targets.is_floating_point():
            return (targets != self.ignore_index).sum()
        tensor = _first_tensor(batch)
        return torch.tensor(1 if tensor is None or tensor.dim() == 0 else tensor.shape[0])

    def __call__(
        self, model: nn.Module, batch: Any, count: Tensor
    ) -> tuple[Tensor, CrossEntropyMetrics | None]:
        result: Any = self.loss_fn(model, batch)  # what users write need not fit the type
        loss, metrics = result, None
        if isinstance(result, tuple):
            if len(result) != 2 or not isinstance(result[1], CrossEntropyMetrics):
                got = ", ".join(type(item).__name__ for item in result)
                raise ValueError(
                    "train: expected loss_fn to return a scalar tensor or (loss, "
                    f"CrossEntropyMetrics), got ({got})"
                )
            loss, metrics = result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"train: expected loss_fn to return a scalar tensor, got {got}")
        # At least float32: a 16-bit sum over the targets could overflow.
        wide = torch.promote_types(loss.dtype, torch.float32)
        return loss.reshape(()).to(wide) * count, metrics


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`: in tuples, lists, dicts, or what has a `to`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if callable(getattr(value, "to", None)):  # a tokenizer's batch, a packed sequence
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} of them" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(
            f"train: expected batches of (inputs, targets), got {got}; loss_fn takes any batch"
        )
    if not isinstance(batch[1], Tensor) or batch[1].is_floating_point():
        got = str(batch[1].dtype if isinstance(batch[1], Tensor) else type(batch[1]).__name__)
        raise ValueError(f"train: expected targets to be a tensor of class indices, got {got}")
    return batch[0], batch[1]


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"train: expected the model to return logits, got {type(output).__name__}; "
            "loss_fn takes any model"
        )
    return logits


def _align(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets as cross_entropy wants them: [N, C] and [N], or torch's [N, C, ...].

    Logits [..., C] with targets [...] win where both readings fit (as many positions as classes).
    """
    if logits.dim() >= 1 and logits.shape[:-1] == targets.shape:
        return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if logits.dim() >= 2 and (logits.shape[0], *logits.shape[2:]) == tuple(targets.shape):
        return logits, targets
    raise ValueError(
        "train: expected logits [..., classes] for targets [...], or [N, classes, ...] for "
        f"[N, ...], got logits {list(logits.shape)} and targets {list(targets.shape)}"
    )


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, tuple, list)):
        return next((found for item in items if (found := _first_tensor(item)) is not None), None)
    return None
