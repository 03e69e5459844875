"""Device tensors on their way to the host, without anybody who waits on the training thread."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Key = TypeVar("Key")


class HostCopies(Generic[Key]):
    """Copies of `tensors`, begun at once on a stream of their own, read on another thread.

    CPU tensors are handed over as they are: whoever made the copies must not use them again. The
    pinned memory is torch's, which keeps what is freed for the next copies.
    """

    def __init__(self, tensors: Mapping[Key, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._events: list[torch.Event] = []
        for device in {t.device for t in tensors.values() if t.device.type != "cpu"}:
            stream = copy_stream(device)
            stream.wait_stream(torch.accelerator.current_stream(device))
            with stream:
                for key, tensor in tensors.items():
                    if tensor.device == device:
                        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                        self._tensors[key] = pinned.copy_(tensor, non_blocking=True)
                        tensor.record_stream(stream)
                self._events.append(stream.record_event())

    def read(self) -> dict[Key, NDArray[Any]]:
        """Wait for the copies; never called on the training thread."""
        for event in self._events:
            event.synchronize()  # sync point
        return {key: np.asarray(tensor.numpy()) for key, tensor in self._tensors.items()}


@functools.cache
def copy_stream(device: torch.device) -> torch.Stream:
    """The stream of `device` that copies to the host while the training's stream goes on."""
    return torch.Stream(device)
