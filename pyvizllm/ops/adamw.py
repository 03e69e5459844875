"""What one optimizer step collects, and the fake kernel of the operation that collects it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyvizllm.ops import _extension  # noqa: F401 - registers the operators
from pyvizllm.ops.tensor_stats import TensorStats


@dataclass(frozen=True)
class StepStatistics:
    """Statistics of one optimizer step over `T` parameters, on their device.

    A parameter without a gradient has the statistics of an empty tensor, and so have all `update`
    and `param` rows of a step that was skipped. Histograms hold the counts of all steps since
    they were last taken.
    """

    parameters: Sequence[Tensor]
    """The parameters of all groups, in order: row `t` of every statistic is of `parameters[t]`."""
    names: Sequence[str] | None
    """Their names, where the optimizer was made from named parameters."""
    grad: TensorStats | None
    """Of the gradients as the optimizer saw them: unscaled, and before clipping."""
    update: TensorStats | None
    """Of the change that the step made: parameter (or master weight) after minus before."""
    param: TensorStats | None
    """Of the parameters after the step."""

    @property
    def update_ratio(self) -> Tensor:
        """[T] float64: norm of the update / norm of the parameter; inf or NaN where that is 0."""
        if self.update is None or self.param is None:
            raise RuntimeError(
                "update_ratio: expected statistics of update and param, "
                "got neither or one; ask for both: optimizer.collect(update=True, param=True)"
            )
        return self.update.norm / self.param.norm


@torch.library.register_fake("pyvizllm::adamw_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_coefficient: Tensor | None,
    statistics: bool,
    update_histogram: Tensor | None,
    param_histogram: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(params) if statistics else 0
    first = params[0]
    return (
        first.new_empty((7, count), dtype=torch.float64),
        first.new_empty((5, count), dtype=torch.int64),
        first.new_empty((7, count), dtype=torch.float64),
        first.new_empty((5, count), dtype=torch.int64),
    )
