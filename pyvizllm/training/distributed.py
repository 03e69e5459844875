"""Processes that train a model together: each has a copy of it, and its share of the batches."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyvizllm.ops.cross_entropy_arguments import is_dtensor

__all__ = ["ALONE", "Processes", "expected_to_be_called", "joined", "unwrapped"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process, number `rank`, and the others. All of them call its methods in turn."""

    rank: int = 0
    size: int = 1

    def sum_of(self, own: Tensor) -> Tensor:
        """The sum of the tensors of all, in `own` itself; no host waits for a GPU."""
        if self.size > 1:
            dist.all_reduce(own)
        return own

    def of_first(self, value: Value) -> Value:
        """What rank 0 calls this with, which the others wait for."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait_for_first(self) -> None:
        """Until rank 0 has come here, too."""
        self.of_first(None)

    def all_of(self, value: Value) -> list[Value]:
        """What each calls this with, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers for all: what batch norm has gathered differs from batch to batch."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def replica(self, model: nn.Module) -> nn.Module:
        """`model` for the forward of a training: its backward averages the gradients of all."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def device(self, device: torch.device) -> torch.device:
        """A GPU of its own for each process, where `device` says "cuda" and no more."""
        if self.size > 1 and str(device) == "cuda":
            local = os.environ.get("LOCAL_RANK", self.rank % torch.cuda.device_count())
            device = torch.device("cuda", int(local))
            torch.cuda.set_device(device)
        return device


ALONE = Processes()
"""A process that trains by itself."""


def joined() -> Processes:
    """The processes of torch's group, or of the one that torchrun has started this process for.

    The group is left to the end of the process, which is torch's own way, and to the caller: one
    that goes while a DistributedDataParallel still has it can hang (torch 2.13, gloo).
    """
    started = {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    if not dist.is_available() or not (dist.is_initialized() or started):
        return ALONE
    if not dist.is_initialized():
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return ALONE
        dist.init_process_group()
    return Processes(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def expected_to_be_called(replica: nn.Module) -> Iterator[None]:
    """Check that a step calls a replica: by any other way each process would train by itself.

    Raises:
        ValueError: it does not.
    """
    calls: list[None] = []
    hook = replica.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield
    finally:
        hook.remove()
    if not calls and isinstance(replica, DistributedDataParallel):
        raise ValueError(
            "train: expected loss_fn to call the model that it is given, which averages the "
            "gradients of several processes, got one that calls another, or a part of it"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where the caller has wrapped it.

    Raises:
        ValueError: a model whose parameters are sharded.
    """
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise ValueError(
            "train: expected parameters that each process has whole, got a DTensor's part; "
            "pyvizllm.watch sees such a training in a loop of your own"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model
