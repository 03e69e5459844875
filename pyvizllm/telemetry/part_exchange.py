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
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE, _LONGEST = 30.0, 120.0
"""Seconds that the publisher's thread waits for a process that has yet to hand over its part.

One that logs nothing hands over when its next step begins: after an evaluation, perhaps. Where it
came after all, later, the next wait is twice as long.
"""
_IMPATIENCE = 0.5  # seconds, of a process that did not come, until it is heard of again
_HURRY = 5.0  # seconds, of all together, while somebody waits for the publisher's thread
_PAUSE, _LONGEST_PAUSE = 0.005, 0.1  # seconds between two looks
_PIECE = 4 * 2**20  # bytes: the store refuses values of more than 8 MiB
_KEPT = 16 * 2**20  # bytes of the last messages; older ones are taken back, fetched or not
_NEVER = -1
Message = Mapping[str, NDArray[Any]]


class MissingPartError(Exception):
    """A message has not come in time, or never will."""


class Sending(NamedTuple):
    """What each process sends at the same point of the training."""

    name: str
    place: int
    """Rises from one to the next: who is at another place or further will not send this one."""


class PartExchange:
    """Messages between the publishers' threads of processes, by names that both sides know.

    Arguments:
        awaited: since when (a reading of time.monotonic) somebody waits for this process's thread,
            which then waits less itself; None while nobody does.
    """

    def __init__(self, awaited: Callable[[], float | None] = lambda: None) -> None:
        # Of the first process, whose store is the others' server: it lives as long as this does.
        self._store = _store()
        self._mine: Store | None = None  # a connection that no other thread waits on
        self._awaited = awaited
        self._sent: deque[tuple[str, int, int]] = deque()  # key, pieces, bytes
        self._patience = PATIENCE
        self._missed: dict[str, int] = {}  # where a sender was that did not come

    def send(self, sender: str, sending: Sending, message: Message) -> None:
        """Leave a message for whoever asks for it."""
        file = io.BytesIO()
        np.savez_compressed(file, **message)  # type: ignore[arg-type]  # of allow_pickle
        whole, store, key = file.getvalue(), self._connection(), f"{sender}/{sending.name}"
        pieces = [whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE)]
        for number, piece in enumerate(pieces):
            store.set(f"{key}/{number}", piece)  # type: ignore[arg-type]
        store.set(key, str(len(pieces)))  # after the others: it says that they are there
        store.set(sender, str(sending.place))  # last: what is not there now will not come
        self._sent.append((key, len(pieces), len(whole)))
        while len(self._sent) > 1 and sum(size for _, _, size in self._sent) > _KEPT:
            self._forget(*self._sent.popleft()[:2])

    def receive(self, senders: Sequence[str], sending: Sending) -> Iterator[Message]:
        """The messages of these senders, in order, each fetched when it is asked for.

        Raises:
            MissingPartError: one of them has not come, or was taken back.
        """
        keys = [f"{sender}/{sending.name}" for sender in senders]
        self._wait(dict(zip(senders, keys, strict=True)), sending.place)
        return map(self._fetched, keys)

    def _wait(self, keys: Mapping[str, str], place: int) -> None:
        store, began, pause = self._connection(), time.monotonic(), _PAUSE
        while not store.check(list(keys.values())):
            # Before the look for the message: who is further now has sent it before, or never.
            places = {sender: self._place(sender) for sender in keys}
            missing = {s: places[s] for s, key in keys.items() if not store.check([key])}
            if any(reached >= place for reached in missing.values()):
                raise MissingPartError
            if time.monotonic() - began >= self._most(missing, began):
                self._missed |= missing
                raise MissingPartError
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _most(self, missing: Mapping[str, int], began: float) -> float:
        """How long to wait, since `began`, for these senders, which have come so far."""
        late = {s for s, reached in missing.items() if self._missed.get(s, reached) != reached}
        if late:
            self._patience = min(2 * self._patience, _LONGEST)
            self._missed = {s: place for s, place in self._missed.items() if s not in late}
        gone = any(sender in self._missed for sender in missing)
        most = _IMPATIENCE if gone else self._patience
        since = self._awaited()
        return most if since is None else min(most, since + _HURRY - began)

    def _place(self, sender: str) -> int:
        store = self._connection()
        return int(store.get(sender)) if store.check([sender]) else _NEVER

    def _fetched(self, key: str) -> Message:
        store = self._connection()
        try:
            count = int(store.get(key))
            whole = b"".join(store.get(f"{key}/{number}") for number in range(count))
        except dist.DistStoreError as error:
            raise MissingPartError from error
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
            # What was there and is taken back meanwhile would be waited for much longer.
            self._mine.set_timeout(timedelta(seconds=_HURRY))
        return self._mine


def _store() -> Store | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        return dist.distributed_c10d._get_default_store()
    except Exception:  # torch's own affair: `watch` must not fail for it
        return None
