"""Parameters that several processes hold together (DTensor): this one's part of each."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from pyvizllm.ops.cross_entropy_arguments import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """This process's part of a parameter.

    Processes with copies of one part are as one: the first of them counts, on each dimension of
    the mesh on which the parameter is replicated.
    """

    ranks: tuple[int, ...]
    """Those whose parts make up the whole; the first of them shows it."""
    rank: int
    """This process's."""
    placements: Sequence[Any]
    shape: tuple[int, ...]
    """Of the whole."""
    local_shape: tuple[int, ...]
    offset: tuple[int, ...] | None
    """Where in the whole this part begins; None: it is no slice of it."""

    @classmethod
    def of(cls, parameter: DTensor) -> Shard:
        """Of a parameter as it is now; nothing is sent, and nothing read from its device."""
        mesh, placements = parameter.device_mesh, parameter.placements
        first = tuple(0 if p.is_replicate() else slice(None) for p in placements)
        local_shape = tuple(parameter.to_local().shape)
        return cls(
            ranks=tuple(mesh.mesh[first].flatten().tolist()),  # of the CPU
            rank=dist.get_rank(),
            placements=placements,
            shape=tuple(parameter.shape),
            local_shape=local_shape,
            offset=_offset_of(parameter, local_shape),
        )

    @property
    def counts(self) -> bool:
        """Whether this process's part is not another's, too."""
        return self.rank in self.ranks

    @property
    def leads(self) -> bool:
        """Whether this process shows the whole."""
        return self.ranks[0] == self.rank

    def refused(self, tensor: DTensor) -> str:
        """Why this tensor, the parameter or its gradient, cannot be measured; or nothing."""
        if any(placement.is_partial() for placement in tensor.placements):
            return "the sum over processes of what each has of it (Partial) is not taken yet"
        if tuple(tensor.placements) != tuple(self.placements):
            return f"it is placed as {tensor.placements}, the parameter as {self.placements}"
        return ""

    def seed(self, name: str) -> int:
        """Of the sketch: the first part's is that of a parameter that is whole.

        Each part has signs of its own, so that the parts' sketches add up to one of the whole.
        """
        number = self.ranks.index(self.rank) if self.counts else 0
        return zlib.crc32((f"{name}@{number}" if number else name).encode())

    def index_in_whole(self, index: int) -> int | None:
        """Of an element of this part, both row-major."""
        if self.offset is None:
            return None
        place = np.unravel_index(index, self.local_shape)
        moved = [int(i) + begin for i, begin in zip(place, self.offset, strict=True)]
        return int(np.ravel_multi_index(moved, self.shape))


def _offset_of(parameter: DTensor, local_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where in the whole this process's part begins; None: it is no slice of it."""
    mesh, cuts = parameter.device_mesh, [getattr(p, "dim", None) for p in parameter.placements]
    coordinate = mesh.get_coordinate()
    if coordinate is None or any(p.is_partial() for p in parameter.placements):
        return None
    local, offset = list(parameter.shape), [0] * parameter.ndim
    # Tensor parallelism cuts before fully_shard does, whose dimension of the mesh is on its left.
    # Its placement says so by a number: of how many parts each is cut along the same dimension.
    strided = [i for i, p in enumerate(parameter.placements) if hasattr(p, "split_factor")]
    for i in [i for i in range(mesh.ndim) if i not in strided] + strided[::-1]:
        dim = cuts[i]
        if dim is None:
            continue
        before = math.prod(mesh.size(j) for j in range(i + 1, mesh.ndim) if cuts[j] == dim)
        if getattr(parameter.placements[i], "split_factor", before) != before:
            return None
        chunk = math.ceil(local[dim] / mesh.size(i))  # DTensor's rule: torch.chunk's
        begin = min(chunk * coordinate[i], local[dim])
        offset[dim] += begin
        local[dim] = min(chunk, local[dim] - begin)
    return tuple(offset) if local_shape == tuple(local) else None


def is_flat_part(parameter: Tensor) -> bool:
    """Whether FullyShardedDataParallel has made it: of which process which part is, is its own."""
    flat = getattr(parameter, "_is_flat_param", False) or getattr(
        parameter, "_fsdp_flattened", False
    )
    return bool(flat) and dist.is_initialized() and dist.get_world_size() > 1


def part_of(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor: its own memory, which nobody is asked for."""
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    # What tensor parallelism has begun to gather is there when somebody waits for it.
    wait = getattr(local, "wait", None)
    return local if wait is None else wait()


def shards_of(parameters: Sequence[Tensor]) -> dict[int, Shard]:
    """Those of `parameters` that are DTensors, by their place."""
    return {i: Shard.of(p) for i, p in enumerate(parameters) if is_dtensor(p)}


def layout_of(names: Mapping[Tensor, str]) -> int:
    """A number that says how the parameters are sharded; 0 where none is."""
    sharded = [
        (name, tuple(p.device_mesh.shape), str(p.placements))
        for p, name in names.items()
        if is_dtensor(p)
    ]
    return zlib.crc32(repr(sharded).encode()) if sharded else 0


def rows_by_ranks(
    shards: Mapping[int, Shard], names: Sequence[str | None]
) -> dict[tuple[int, ...], dict[str, int]]:
    """The rows of named parameters that this process has a part of, by who has the others."""
    rows: dict[tuple[int, ...], dict[str, int]] = {}
    for index, shard in shards.items():
        name = names[index]
        if name is not None and shard.counts:
            rows.setdefault(shard.ranks, {})[name] = index
    return rows
