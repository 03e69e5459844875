"""Gradient statistics summed over the steps of an interval, kept beside the gradients."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyvizllm.ops import BINS, TensorStats, tensor_stats

# Rows of TensorStats.values: the sums, the minimum, and the two maxima.
_SUMS, _MINIMUM, _MAXIMA = slice(0, 4), 4, slice(5, 7)

NamedParameters = list[tuple[str, torch.nn.Parameter]]


@dataclass
class GradientSums:
    """What T parameters of one device did in an interval; all tensors are on that device.

    `steps[i]` is the number of steps at which parameter i had a gradient. `stats` is as of one
    tensor_stats call, with `values` and `counts` (the norms too) added over the steps, and the
    minima and maxima over the steps. `histogram` is [T, 4096] int64.
    """

    named_parameters: NamedParameters
    nothing: Tensor  # [0] stands in for a missing gradient: every parameter keeps its row
    histogram: Tensor | None
    steps: list[int]
    stats: TensorStats | None = None

    def add(self, stats: TensorStats) -> None:
        """Add one step's statistics; the first step's tensors become the sums themselves."""
        if self.stats is None:
            self.stats = stats
            return
        mine, new = self.stats.values, stats.values
        mine[_SUMS] += new[_SUMS]
        torch.minimum(mine[_MINIMUM], new[_MINIMUM], out=mine[_MINIMUM])
        torch.maximum(mine[_MAXIMA], new[_MAXIMA], out=mine[_MAXIMA])
        self.stats.counts.add_(stats.counts)


class GradientStatistics:
    """One `tensor_stats` call a step for each device that holds gradients; reads nothing back.

    Arguments:
        named_parameters: (name, parameter) pairs; a tied parameter counts under its first name.
        histograms: also count the values (32 KiB a parameter).
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], *, histograms: bool
    ) -> None:
        first_names: dict[torch.nn.Parameter, str] = {}  # parameters hash by identity
        for name, parameter in named_parameters:
            first_names.setdefault(parameter, name)
        self._parameters = [(name, parameter) for parameter, name in first_names.items()]
        self._histograms = histograms
        self._unassigned = list(self._parameters)
        self._groups: list[GradientSums] = []

    @torch.no_grad()
    def observe(self) -> Tensor:
        """Add the gradients as they are now; return the norm of all together, [] float64."""
        if self._unassigned:
            self._assign()
        norms = []
        for group in self._groups:
            histogram = group.histogram if group.histogram is not None else False
            stats = tensor_stats(_gradients(group), histogram=histogram)
            group.add(stats)
            norms.append(stats.total_norm)
        if len(norms) == 1:
            return norms[0]
        # On an accelerator if there is one: bringing a norm from there to the CPU would wait.
        device = next((norm.device for norm in norms if norm.device.type != "cpu"), "cpu")
        here = [norm.to(device, non_blocking=True) for norm in norms]
        return torch.stack(here).norm() if here else torch.zeros((), dtype=torch.float64)

    def take(self) -> list[GradientSums]:
        """Hand over the interval's sums; the next `observe` begins an interval."""
        taken = [group for group in self._groups if group.stats is not None]
        self._groups, self._unassigned = [], list(self._parameters)
        return taken

    def _assign(self) -> None:
        """Give a row to each parameter that trains, also to one unfrozen within the interval."""
        by_device: dict[torch.device, NamedParameters] = {}
        frozen: NamedParameters = []
        for name, parameter in self._unassigned:
            if parameter.requires_grad or parameter.grad is not None:
                by_device.setdefault(parameter.device, []).append((name, parameter))
            else:
                frozen.append((name, parameter))
        self._unassigned = frozen
        for device, named in by_device.items():
            histogram = None
            if self._histograms:
                histogram = torch.zeros((len(named), BINS), dtype=torch.int64, device=device)
            nothing = torch.empty(0, device=device)
            self._groups.append(GradientSums(named, nothing, histogram, [0] * len(named)))


def _gradients(group: GradientSums) -> list[Tensor]:
    """The T gradients of a group as they are now, counted in `group.steps`."""
    gradients = []
    for index, (name, parameter) in enumerate(group.named_parameters):
        gradient = parameter.grad
        if gradient is None:
            gradients.append(group.nothing)
            continue
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"observe_gradients: expected dense gradients, got one of layout "
                f"{gradient.layout} for {name} (torch.nn.Embedding: use sparse=False; train: or "
                "telemetry=False and max_grad_norm=0)"
            )
        group.steps[index] += 1
        # A complex gradient is measured as the real and imaginary numbers that it is made of.
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient.resolve_conj())
        gradients.append(gradient)
    return gradients
