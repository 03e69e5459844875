"""AdamW that clips, skips bad steps and collects statistics in its one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from pyvizllm.ops.adamw import adamw_
from pyvizllm.ops.tensor_stats import TensorStats
from pyvizllm.optim.collection import Collector, StepStatistics
from pyvizllm.optim.foreign import check_kernels_suffice, step_with_torch
from pyvizllm.optim.state import StateKeeper, Work, is_ours

# What a pickled or copied optimizer keeps beyond torch's own.
_OWN = (
    *("max_grad_norm", "skip_nonfinite", "grad_norm", "_skipped_steps", "collected"),
    *("_keeper", "_collector", "_step_supports_amp_scaling"),
)


class AdamW(torch.optim.AdamW):
    """A drop-in for `torch.optim.AdamW`: one pass over memory, whatever is asked of it.

    State dicts are interchangeable with torch's, both ways; `foreach`, `fused` and `capturable` are
    accepted and make no difference, since the step is always fused, keeps its state on the device
    and never waits for it. Nothing is written to gradients, not even under a `GradScaler`, but by a
    step that collects their statistics, which unscales them first (in a copy, where one cannot be
    written to: an expanded one). Rounding errors are no larger than torch's (arXiv:1711.05101 gives
    the method). `max_grad_norm`, `skip_nonfinite`, `moments_dtype`, `master_weights` and
    `skipped_steps` are the optimizer's own and in no state dict: what is loaded takes the dtypes of
    the optimizer that loads it.

    What these kernels cannot do is left to torch's own implementation: `differentiable=True`,
    complex parameters, tensor subclasses with storage elsewhere (DTensor), devices other than CPU
    and CUDA. Sparse gradients raise as in torch. Take a first step, with all that is to be
    collected, before capturing a CUDA graph.

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
            weights, kept in the state as "master". One that was assigned to begins a new master.

    Attributes:
        grad_norm: [] float64, on the device: the norm over all gradients of the last step, before
            clipping; None unless clipping, skipping or collecting gradients.
        skipped_steps: [] int64, on the device: the steps that skip_nonfinite skipped.
        collected: what the last step collected, or None; see `collect`. Its histograms are those
            that the next steps add to; `take` returns copies.

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
    _next_collector: Collector | None = None  # of the next step alone; neither copied nor saved

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
        self.grad_norm: Tensor | None = None
        self._skipped_steps: Tensor | None = None
        self.collected: StepStatistics | None = None
        self._keeper = StateKeeper(moments_dtype, master_weights)
        self._collector = Collector()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and raises ValueError for a parameter that is in the group twice.

        torch steps it twice, one step after the other, and warns that it will raise one day; a
        kernel that steps all parameters at once would do both at the same time.
        """
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({id(param) for param in params}) < len(params):
            del self.param_groups[-1]
            raise ValueError("AdamW: expected each parameter once, got one that is listed twice")

    @property
    def skipped_steps(self) -> Tensor:
        """[] int64: the steps that skip_nonfinite skipped."""
        if self._skipped_steps is None:
            return torch.zeros((), dtype=torch.int64)
        return self._skipped_steps

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
        self._collector = self._collector.changed(grad, update, param, histograms)
        self.collected = None

    @property
    def collecting(self) -> bool:
        """Whether `collect`, or `collect_next` for the next step, has chosen anything."""
        return bool(self._next_collector or self._collector)

    def can_collect(self) -> bool:
        """Whether a step could collect: dense real parameters, all on one device."""
        parameters = self._parameters()
        differentiable = any(group["differentiable"] for group in self.param_groups)
        devices = {parameter.device for parameter in parameters}
        return len(devices) == 1 and not differentiable and all(map(is_ours, parameters))

    def collect_next(
        self,
        *,
        grad: bool = False,
        update: bool = True,
        param: bool = True,
        histograms: Mapping[str, Tensor],
    ) -> None:
        """Choose what the next step alone collects into `collected`, whatever `collect` chose.

        Args:
            grad, update, param: as of `collect`.
            histograms: "grad", "update" and "param", or some of them, to the counts [T, 4096]
                int64 that the step adds to; T is the number of the optimizer's parameters.

        Raises:
            ValueError: in the step, for counts of another shape or dtype.

        Example:
            >>> counts = torch.zeros(len(parameters), 4096, dtype=torch.int64)
            >>> optimizer.collect_next(param=False, histograms={"update": counts})
        """
        self._next_collector = Collector(grad, update, param, True, given=histograms)

    def take(self) -> StepStatistics | None:
        """Return what was collected, in tensors of its own, and begin new histograms."""
        taken, self.collected = self.collected, None
        return self._collector.take(taken)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step; the host waits for nothing.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, and where clipping, skipping or collecting is asked
                for and a parameter is one that only torch's implementation can step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self) -> None:
        # Set by torch.amp.GradScaler before the step, and deleted after it.
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        collector, self._next_collector = self._next_collector or self._collector, None
        reads_gradients = collector.grad or self.skip_nonfinite or self.max_grad_norm is not None
        work = [
            self._keeper.gather(group, self.state, bool(collector)) for group in self.param_groups
        ]
        if collector or reads_gradients:
            check_kernels_suffice(work, bool(collector))
        grad, clip_coefficient = None, None
        self.grad_norm = None
        if reads_gradients and any(part.devices for part in work):
            if collector.grad and grad_scale is not None:
                _unscale(work, grad_scale)  # what is counted must be the gradient itself
                grad_scale = None
            grad, found_inf = self._read_gradients(work, collector, grad_scale, found_inf)
            if self.max_grad_norm is not None:
                clip_coefficient = (self.max_grad_norm / (grad.total_norm + 1e-6)).clamp(max=1.0)
        outputs = self._run(work, collector, grad_scale, found_inf, clip_coefficient)
        self.collected = None
        if collector and outputs:
            names = [name for group in self.param_groups for name in group.get("param_names", [])]
            self.collected = collector.result(self._parameters(), names or None, grad, outputs)

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _read_gradients(
        self,
        work: list[Work],
        collector: Collector,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> tuple[TensorStats, Tensor | None]:
        """Set grad_norm, and found_inf if the step is to be skipped. One read of the gradients."""
        grads: dict[torch.device, list[Tensor]] = {}
        for part in work:
            for device, lists in part.devices.items():
                grads.setdefault(device, []).extend(lists.grads)
        histogram = collector.histogram("grad", self._parameters())
        results = []
        for some in grads.values():
            values, counts, norm = torch.ops.pyvizllm.tensor_stats(some, histogram)
            results.append(TensorStats(values, counts, norm, histogram))
        first = results[0]
        norm = first.total_norm
        if len(results) > 1:
            norms = [_on(norm.device, other.total_norm) for other in results]
            norm = torch.linalg.vector_norm(torch.stack(norms))
        if grad_scale is not None:
            norm = norm / _on(norm.device, grad_scale)
        self.grad_norm = norm
        if self.skip_nonfinite:
            bad = [
                _on(norm.device, r.nans.sum() + r.pos_infs.sum() + r.neg_infs.sum())
                for r in results
            ]
            skip = torch.stack(bad).sum() > 0
            self._count_skipped(skip)
            found_inf = skip.float() if found_inf is None else found_inf.maximum(skip.float())
        return TensorStats(first.values, first.counts, norm, histogram), found_inf

    def _count_skipped(self, skip: Tensor) -> None:
        if self._skipped_steps is None or self._skipped_steps.device != skip.device:
            self._skipped_steps = self.skipped_steps.to(skip.device)
        self._skipped_steps += skip  # in place: a captured graph adds to it at each replay

    def _run(
        self,
        work: list[Work],
        collector: Collector,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip_coefficient: Tensor | None,
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Step every group's parameters; return what the kernels collected."""
        update_counts = collector.histogram("update", self._parameters())
        param_counts = collector.histogram("param", self._parameters())
        outputs, row = [], 0
        for part in work:
            for device, lists in part.devices.items():
                rows = slice(row, row + len(lists.params))
                row = rows.stop
                output = adamw_(
                    lists,
                    part.group,
                    grad_scale=None if grad_scale is None else _on(device, grad_scale),
                    found_inf=None if found_inf is None else _on(device, found_inf),
                    clip_coefficient=None
                    if clip_coefficient is None
                    else _on(device, clip_coefficient),
                    statistics=collector.from_step,
                    update_histogram=None if update_counts is None else update_counts[rows],
                    param_histogram=None if param_counts is None else param_counts[rows],
                )
                outputs.append(output)
            if part.foreign:
                step_with_torch(self, part, grad_scale, found_inf)
        return outputs

    # -- Saved and copied -------------------------------------------------------------------------

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the state of this class or of torch's AdamW, whichever way that one was fused."""
        loaded: list[StateDict] = []
        pre = self.register_load_state_dict_pre_hook(lambda _, given: loaded.append(given))
        post = self.register_load_state_dict_post_hook(  # before those of the user
            lambda _: self._keeper.load(self.param_groups, self.state, loaded[0]), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            pre.remove()
            post.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _OWN}}


def _on(device: torch.device, scalar: Tensor) -> Tensor:
    """A scalar where a kernel reads it; sync point, from a GPU to the CPU."""
    return scalar.to(device, non_blocking=device.type != "cpu")


def _unscale(work: list[Work], grad_scale: Tensor) -> None:
    for part in work:
        for device, lists in part.devices.items():
            if any(grad.dtype == torch.float16 for grad in lists.grads):
                raise ValueError("Attempting to unscale FP16 gradients.")  # torch's words
            scale = _on(device, grad_scale)
            writable = []
            for index, grad in enumerate(lists.grads):
                if _is_writable(grad):
                    writable.append(grad)
                else:
                    lists.grads[index] = grad / scale
            if writable:
                torch._foreach_div_(writable, scale)


def _is_writable(grad: Tensor) -> bool:
    """Whether each element has memory of its own (not of expand), which holds its value."""
    return not (grad.is_neg() or grad.is_inference() or torch._debug_has_internal_overlap(grad))
