"""Numbers of sharded parameters on their way from one process's publisher to another's.

They go through the store by which the processes of torch.distributed have met, which is asked and
never waited for with a lock held: there is no collective, which a process whose watch has ended,
or that never had one, would keep all others waiting in. What does not come is left out.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE = 5.0
"""Seconds that the publisher's thread waits for others' parts; less once some did not come."""
_IMPATIENCE, _PAUSE = 0.5, 0.01  # seconds
_PIECE = 4 * 2**20  # bytes: the store refuses values of more than 8 MiB
_KEPT = 8  # messages that nobody has fetched; older ones are taken back
Message = Mapping[str, NDArray[Any]]


class PartExchange:
    """Messages between the publishers' threads of processes, by names that both sides know."""

    def __init__(self) -> None:
        # Of the first process, whose store is the others' server: it lives as long as this does.
        self._store = _store()
        self._mine: Store | None = None  # a connection that no other thread waits on
        self._sent: deque[tuple[str, int]] = deque()
        self._patience = PATIENCE

    def number(self, key: str) -> int:
        """How often this was called with `key`, by all processes together."""
        return int(self._connection().add(key, 1))

    def send(self, key: str, message: Message) -> None:
        """Leave a message for whoever asks for `key`."""
        file = io.BytesIO()
        np.savez_compressed(file, **message)  # type: ignore[arg-type]  # of allow_pickle
        whole, store = file.getvalue(), self._connection()
        pieces = [whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE)]
        for number, piece in enumerate(pieces):
            store.set(f"{key}/{number}", piece)  # type: ignore[arg-type]
        store.set(key, str(len(pieces)))  # last: it says that the others are there
        self._sent.append((key, len(pieces)))
        if len(self._sent) > _KEPT:
            self._forget(*self._sent.popleft())

    def receive(self, keys: Sequence[str]) -> list[Message] | None:
        """The messages of these keys, in order; None if some have not come in time."""
        store, until = self._connection(), time.monotonic() + self._patience
        while not store.check(list(keys)):
            if time.monotonic() > until:
                self._patience = _IMPATIENCE
                return None
            time.sleep(_PAUSE)
        self._patience = PATIENCE
        return [self._fetched(key) for key in keys]

    def _fetched(self, key: str) -> Message:
        store = self._connection()
        count = int(store.get(key))
        whole = b"".join(store.get(f"{key}/{number}") for number in range(count))
        self._forget(key, count)
        try:
            with np.load(io.BytesIO(whole), allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except zipfile.BadZipFile as error:
            raise ValueError(f"what came as {key} is no message") from error

    def _forget(self, key: str, pieces: int) -> None:
        for name in (key, *(f"{key}/{number}" for number in range(pieces))):
            self._connection().delete_key(name)

    def _connection(self) -> Store:
        if self._store is None:
            raise RuntimeError("torch.distributed has no store")
        if self._mine is None:
            self._mine = self._store.clone()  # type: ignore[attr-defined]
        return self._mine


def _store() -> Store | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        return dist.distributed_c10d._get_default_store()
    except Exception:  # torch's own affair: `watch` must not fail for it
        return None
