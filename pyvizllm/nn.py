"""Losses as modules."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy
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
        shown = {
            "weight": None if self.weight is None else list(self.weight.shape),
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            **self.options,
        }
        plain = (None, -100, "mean", 0.0, 0.0, 0.0, 1.0, False, False, False)
        pairs = zip(shown.items(), plain, strict=True)
        return ", ".join(
            f"{name}={value!r}" for (name, value), default in pairs if value != default
        )
