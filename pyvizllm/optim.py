"""AdamW that clips, skips bad steps and collects statistics in its one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from pyvizllm.ops.adamw import StepStatistics
from pyvizllm.ops.tensor_stats import BINS, TensorStats

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# What a pickled or copied optimizer keeps beyond torch's own.
_OWN = (
    *("max_grad_norm", "skip_nonfinite", "moments_dtype", "master_weights"),
    *("grad_norm", "skipped_steps", "_wanted", "_step_supports_amp_scaling"),
)


@dataclass(frozen=True)
class _Wanted:
    """What is collected."""

    grad: bool = False
    update: bool = False
    param: bool = False
    histograms: bool = False

    def __bool__(self) -> bool:
        return self.grad or self.update or self.param


@dataclass
class _Lists:
    """The operator's lists: one parameter group's tensors on one device."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


@dataclass
class _Work:
    """One parameter group's part of a step."""

    group: dict[str, Any]
    devices: dict[torch.device, _Lists] = field(default_factory=dict)
    foreign: list[Tensor] = field(default_factory=list)  # parameters that torch has to step


class AdamW(torch.optim.AdamW):
    """A drop-in for `torch.optim.AdamW`: one pass over memory, whatever is asked of it.

    State dicts are interchangeable with torch's, both ways; `foreach`, `fused` and `capturable`
    are accepted and make no difference, since the step is always fused, keeps its state on the
    device and never waits for it. Nothing is written to gradients, not even under a `GradScaler`,
    but by a clipped, skipping or gradient-collecting step, which unscales them first.
    Rounding errors are no larger than torch's (arXiv:1711.05101 gives the method).

    What these kernels cannot do is left to torch's own implementation: `differentiable=True`,
    complex parameters, tensor subclasses with storage elsewhere (DTensor), devices other than CPU
    and CUDA. Sparse gradients raise as in torch. Take a first step before capturing a CUDA graph.

    Args:
        params: parameters, named parameters or groups of them, of float32, bfloat16, float16 or
            float64, of any shape and layout, on any mixture of devices.
        lr: a float, or a tensor of one element, which is read on the device.
        betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            as in torch.
        max_grad_norm: the norm over all gradients that a step clips to; None does not clip. Reads
            the gradients once more, and leaves them unclipped.
        skip_nonfinite: whether a step whose gradients hold a NaN or an Inf changes nothing.
        moments_dtype: torch.float32 for float32 moments of bfloat16 and float16 parameters; None
            for the parameter's dtype.
        master_weights: whether bfloat16 and float16 parameters are rounded copies of float32
            weights, kept in the state as "master". Assigning to such a parameter has no effect.

    Attributes:
        grad_norm: [] float64, on the device: the norm over all gradients of the last step, before
            clipping; None unless clipping, skipping or collecting gradients.
        skipped_steps: [] int64, on the device: the steps that skip_nonfinite skipped.
        collected: what the last step collected, or None; see `collect`.

    Raises:
        ValueError: for arguments out of range, as torch does.

    Example:
        >>> optimizer = AdamW(model.parameters(), lr=3e-4, max_grad_norm=1.0)
        >>> optimizer.collect(histograms=False)
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.collected.update_ratio
    """

    # GradScaler hands over the scale and found_inf and leaves the rest to the step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        moments_dtype: torch.dtype | None = None,
        master_weights: bool = False,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"AdamW: expected max_grad_norm >= 0 or None, got {max_grad_norm}")
        if moments_dtype not in (None, torch.float32):
            raise ValueError(
                f"AdamW: expected moments_dtype torch.float32 or None, got {moments_dtype}"
            )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._step_supports_amp_scaling = not differentiable
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.moments_dtype = moments_dtype
        self.master_weights = master_weights
        self.grad_norm: Tensor | None = None
        self.skipped_steps = torch.zeros(
            (), dtype=torch.int64, device=self.param_groups[0]["params"][0].device
        )
        self.collected: StepStatistics | None = None
        self._wanted = _Wanted()
        self._histograms: dict[str, Tensor] = {}
        self._placeholders: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # -- What is collected ------------------------------------------------------------------------

    def collect(
        self,
        *,
        grad: bool = False,
        update: bool = True,
        param: bool = True,
        histograms: bool = True,
    ) -> None:
        """Choose what the following steps collect into `collected`; all False collects nothing.

        Args:
            grad: statistics of the gradients, from one more read of them.
            update: statistics of the change to each parameter, from the step's own pass.
            param: statistics of each parameter after the step, from the step's own pass.
            histograms: 4096-bin histograms of the same, added up over the steps until `take`.

        Example:
            >>> optimizer.collect(grad=True)
        """
        self._wanted = _Wanted(grad, update, param, histograms and (grad or update or param))
        self._histograms = {}
        self.collected = None

    def take(self) -> StepStatistics | None:
        """Return what was collected, and begin new histograms with the next step."""
        taken, self.collected, self._histograms = self.collected, None, {}
        return taken
