"""Losses as modules."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy, linear_cross_entropy
from pyvizllm.ops.cross_entropy_arguments import Reduction


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`pyvizllm.cross_entropy` as a module: a drop-in for `torch.nn.CrossEntropyLoss`, and one.

    Args:
        weight: class weights [C]; a buffer of the module, in its state_dict.
        size_average, reduce: torch's old names of a reduction; deprecated there.
        ignore_index, reduction, label_smoothing: as in torch.
        z_loss, softcap, logit_scale, return_metrics, fused, inplace: as in
            `pyvizllm.cross_entropy`.

    Example:
        >>> loss = pyvizllm.CrossEntropyLoss(label_smoothing=0.1, fused=True)
        >>> loss(logits, target).backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        return_metrics: bool | Literal["per_token"] = False,
        fused: bool = False,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options: dict[str, Any] = {
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "return_metrics": return_metrics,
            "fused": fused,
            "inplace": inplace,
        }

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor
    ) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
        """The loss of logits [C], [N, C] or [N, C, d1, ...], and the metrics if asked for."""
        result: Tensor | tuple[Tensor, CrossEntropyMetrics] = cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            cast(Reduction, self.reduction),
            self.label_smoothing,
            **self.options,
        )
        return result

    def extra_repr(self) -> str:
        """The options that are not the default ones."""
        weight = None if self.weight is None else list(self.weight.shape)
        torchs = {
            "weight": weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }
        return _shown(torchs | self.options)


class LinearCrossEntropyLoss(torch.nn.Module):
    """`linear_cross_entropy` as a module: a linear layer [C, H] and the loss of its output.

    Args:
        in_features, num_classes, bias, device, dtype: as in `torch.nn.Linear`, whose parameters
            `weight` [C, H] and `bias` [C] it has, initialised in the same way. To tie it to an
            embedding, assign the embedding's weight to `weight`.
        class_weight: [C], a buffer.
        the others: as in `pyvizllm.linear_cross_entropy`.

    Example:
        >>> loss = pyvizllm.LinearCrossEntropyLoss(768, 50257, bias=False)
        >>> loss(hidden, tokens).backward()
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        return_metrics: bool | Literal["per_token"] = False,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.weight = linear.weight
        self.bias = linear.bias
        self.register_buffer("class_weight", class_weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "return_metrics": return_metrics,
            "chunk_size": chunk_size,
        }

    def reset_parameters(self) -> None:
        """Initialises `weight` and `bias` as `torch.nn.Linear` does."""
        torch.nn.Linear.reset_parameters(cast(torch.nn.Linear, self))

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, CrossEntropyMetrics]:
        """The loss of input [..., H] and target [...] or [..., C], and the metrics if asked for."""
        return linear_cross_entropy(
            input, self.weight, target, self.bias, class_weight=self.class_weight, **self.options
        )

    def extra_repr(self) -> str:
        """The layer, and the options that are not the default ones."""
        classes, features = self.weight.shape
        layer = f"in_features={features}, num_classes={classes}, bias={self.bias is not None}"
        weight = None if self.class_weight is None else list(self.class_weight.shape)
        options = _shown({"class_weight": weight} | self.options)
        return f"{layer}, {options}" if options else layer


_DEFAULTS = {"ignore_index": -100, "reduction": "mean", "logit_scale": 1.0}
"""Of the options that are not false by default."""


def _is_default(name: str, value: Any) -> bool:
    return bool(value == _DEFAULTS[name] if name in _DEFAULTS else not value)


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in options.items() if not _is_default(k, v))
