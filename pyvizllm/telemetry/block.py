"""The parameters of one optimizer on one device: where they are measured, and into what."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from pyvizllm.ops import TensorStats, first_nonfinite_, sketch, tensor_stats
from pyvizllm.ops.cross_entropy_arguments import is_dtensor
from pyvizllm.ops.dtypes import FLOATING
from pyvizllm.telemetry.histogram_counts import HistogramCounts
from pyvizllm.telemetry.records import KINDS, Kind
from pyvizllm.telemetry.shards import is_flat_part, part_of, rows_by_ranks, shards_of

_logger = logging.getLogger("pyvizllm")


class Block:
    """`parameters` share an optimizer and a device; a row of each statistic is one of them.

    `names[i]` is None for a parameter that is not shown: it is not the model's, or left out, or
    has never trained, or another process shows the whole of it, or none can (`is_flat_part`). It
    has its row all the same, because an optimizer measures all it steps. Of a sharded one (a
    DTensor) that is this process's part; `parts` has the rows of those by the ranks that have the
    other parts, and by name.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str | None],
        device: torch.device,
        histograms: Sequence[Kind],
    ) -> None:
        self.parameters, self.device = list(parameters), device
        self._names = list(names)
        self.shards = shards_of(parameters)
        self.parts = rows_by_ranks(self.shards, names)
        self._flat = {i for i, p in enumerate(parameters) if is_flat_part(p)}
        # Frozen ones are looked at each step: they are shown once they train.
        self._frozen = {i for i, p in enumerate(parameters) if not _trains(p)}
        self.names = [None if i in self._frozen else self._shown(i) for i in range(len(names))]
        self.counts = {
            kind: HistogramCounts(len(parameters), device) for kind in KINDS if kind in histograms
        }
        self._nothing = torch.empty(0, device=device)  # keeps the row of what is not measured
        self._careful = not all(map(_is_plain, parameters))
        self._warned: set[int] = set()
        self._warned_placement = False
        self._before: list[Tensor] = []

    @property
    def incomplete(self) -> bool:
        """Whether something of it could not be measured, or is measured by other processes."""
        return bool(self._warned) or self.in_parts

    @property
    def in_parts(self) -> bool:
        """Whether other processes have parts of it."""
        return bool(self.shards or self._flat)

    @property
    def shows_all(self) -> bool:
        """Whether all its gradients are shown."""
        rows = zip(self.names, self.parameters, strict=True)
        return all(name is not None or parameter.grad is None for name, parameter in rows)

    def shares_with(self, other: Block) -> bool:
        """Whether a parameter's name is in both."""
        mine = {name for name in self._names if name is not None}
        return not mine.isdisjoint(other._names)

    def accumulator(self, kind: Kind) -> Tensor | None:
        """The counts [rows, 4096] to add to; None where `kind` has no histograms."""
        counts = self.counts.get(kind)
        return None if counts is None else counts.accumulator()

    def find_unfrozen(self) -> None:
        """Show the parameters that train from now on."""
        for index in [i for i in self._frozen if _trains(self.parameters[i])]:
            self._frozen.discard(index)
            self.names[index] = self._shown(index)

    def measure_gradients(self, *, count: bool) -> TensorStats:
        """Of the gradients as they are now; `count` adds them to the histograms."""
        nothing = self._nothing
        gradients = [nothing if (g := p.grad) is None else g for p in self.parameters]
        return self._measure("grad", gradients, count)

    def find_nonfinite(self, stats: TensorStats, found: Tensor, row: int) -> None:
        """Note where the first NaN or Inf of each gradient is, as `first_nonfinite_` does.

        `stats` are those of the gradients as they are now.
        """
        nothing = self._nothing
        gradients = [nothing if (g := p.grad) is None else g for p in self.parameters]
        if self._careful:
            gradients = [self._measurable("grad", i, g) for i, g in enumerate(gradients)]
        first_nonfinite_(gradients, stats.counts, found, row=row)

    def sketch(self) -> Tensor:
        """[rows, 64] of the parameters as they are now; a parameter's name chooses its signs."""
        seeds = [zlib.crc32((name or "").encode()) for name in self._names]
        for index, shard in self.shards.items():
            seeds[index] = shard.seed(self._names[index] or "")
        return sketch(self._now(), seeds=seeds)

    def measure_parameters(self) -> TensorStats:
        """Of the parameters as they are now, added to their histograms."""
        return self._measure("param", [p.detach() for p in self.parameters], True)

    def remember_parameters(self) -> None:
        """Keep the parameters from before a step, where something is to be measured of it."""
        now = self._now()
        if [tensor.shape for tensor in self._before] != [tensor.shape for tensor in now]:
            # The difference of two 16-bit numbers need not be a 16-bit number.
            self._before = [
                torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
                for tensor in now
            ]
        torch._foreach_copy_(self._before, now)

    def measure_updates(self) -> TensorStats:
        """Of the parameters now minus those that were remembered."""
        torch._foreach_neg_(self._before)
        torch._foreach_add_(self._before, self._now())
        return self._measure("update", self._before, True)

    def _shown(self, index: int) -> str | None:
        """The name of a parameter that this process is to show once it trains."""
        shard = self.shards.get(index)
        elsewhere = index in self._flat or not (shard is None or shard.leads)
        return None if elsewhere else self._names[index]

    def _now(self) -> list[Tensor]:
        return [self._measurable("param", i, p.detach()) for i, p in enumerate(self.parameters)]

    def _measure(self, kind: Kind, tensors: list[Tensor], count: bool) -> TensorStats:
        counts = self.accumulator(kind) if count else None
        histogram: bool | Tensor = False if counts is None else counts
        if not self._careful:
            try:
                return tensor_stats(tensors, histogram=histogram)
            except (RuntimeError, TypeError, ValueError):  # one that it cannot measure
                self._careful = True
        tensors = [self._measurable(kind, i, tensor) for i, tensor in enumerate(tensors)]
        return tensor_stats(tensors, histogram=histogram)

    def _measurable(self, kind: Kind, index: int, tensor: Tensor) -> Tensor:
        """`tensor` as dense real numbers; an empty one, and one warning, where it has none.

        Of a DTensor this process's part; an empty one where another process counts the same part.
        """
        if is_dtensor(tensor):
            shard = self.shards.get(index)
            refused = "the parameter is none" if shard is None else shard.refused(tensor)
            if refused:
                if not self._warned_placement:
                    self._warned_placement = True
                    _logger.warning(
                        "watch: %s of %s is left out, and so are others like it: of a DTensor, %s",
                        *(kind, self._names[index] or f"parameter {index}", refused),
                    )
                return self._nothing
            if shard is None or not shard.counts:
                return self._nothing
            tensor = part_of(tensor)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if _is_plain(tensor) and tensor.device == self.device:
            return tensor
        if index not in self._warned:
            self._warned.add(index)
            _logger.warning(
                "watch: %s of %s is left out: expected a dense tensor of floating point on %s, "
                "got a %s, %s of %s on %s",
                *(kind, self._names[index] or f"parameter {index}", self.device),
                *(type(tensor).__name__, tensor.layout, tensor.dtype, tensor.device),
            )
        return self._nothing


def _trains(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None


def _is_plain(tensor: Tensor) -> bool:
    """Whether its memory is all of it, as numbers that can be measured: no DTensor, no sparse."""
    plain = type(tensor) in (Tensor, Parameter) or (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    return plain and tensor.layout == torch.strided and tensor.dtype in FLOATING
