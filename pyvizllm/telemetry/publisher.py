"""The thread that turns snapshots into publications and hands them to the sinks.

Training hands over a snapshot (a function) and goes on; whatever is slow or fails happens here.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from pyvizllm.telemetry.records import Publication
from pyvizllm.telemetry.sinks import Sink

DROPPED_TAG = "pyvizllm/dropped"
_FLUSH_SECONDS = 1.0  # at most this long between two flushes while the queue is never empty
_logger = logging.getLogger("pyvizllm")


class Publisher:
    """A bounded queue and one daemon thread; it never blocks and never stops the training.

    When the queue is full the oldest snapshot is dropped; the number dropped so far is published as
    `pyvizllm/dropped` with the next publication. A sink that raises is switched off with one
    logged warning, the others go on. What is queued at the end of the program is still written.
    In a forked child every method does nothing: the files and the thread are the parent's.

    Arguments:
        sinks: where publications go, called by the thread only.
        queue_size: the most snapshots that wait.
    """

    def __init__(self, sinks: Sequence[Sink], queue_size: int = 64) -> None:
        if queue_size < 1:
            raise ValueError(f"Publisher: expected queue_size of at least 1, got {queue_size}")
        self._sinks = list(sinks)
        self._queue: deque[tuple[int, Callable[[], Publication | None]]] = deque()
        self._queue_size = queue_size
        self._changed = threading.Condition()
        self._submitted = 0  # the number of the last snapshot accepted
        self._unflushed: int | None = None  # the first one taken by the thread, not yet on disk
        self._dropped = 0
        self._reported = 0  # the number of drops that the sinks have been told
        self._closing = False
        self._warned_unreadable = self._warned_closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="pyvizllm-publisher", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """How many snapshots were dropped so far."""
        return self._dropped

    def submit(self, snapshot: Callable[[], Publication | None]) -> None:
        """Queue `snapshot`, which the thread will call; never waits for the thread's work."""
        if os.getpid() != self._pid:  # before the lock: the fork may have copied it locked
            return
        with self._changed:
            if self._closing:
                self._dropped += 1
                if not self._warned_closed:
                    self._warned_closed = True
                    _logger.warning("Publisher.submit: already closed, nothing more is written")
                return
            if len(self._queue) == self._queue_size:
                self._queue.popleft()
                self._dropped += 1
            self._submitted += 1
            self._queue.append((self._submitted, snapshot))
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything submitted so far is on disk; False if `timeout` seconds pass."""
        if os.getpid() != self._pid:
            return True
        with self._changed:
            goal = self._submitted
            return self._changed.wait_for(lambda: self._first_unsettled() > goal, timeout)

    def close(self, timeout: float | None = 60.0) -> None:
        """Write what is queued, close the sinks and end the thread.

        A sink that hangs is given up after `timeout` seconds, with a warning.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            message = "Publisher.close: gave up after %s s, %d publications are not on disk"
            _logger.warning(message, timeout, self._submitted - self._first_unsettled() + 1)
        atexit.unregister(self.close)

    def _first_unsettled(self) -> int:
        """The number of the oldest snapshot that is neither on disk nor dropped."""
        if self._unflushed is not None:
            return self._unflushed
        return self._queue[0][0] if self._queue else self._submitted + 1

    def _run(self) -> None:
        last_flush = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                number, snapshot = self._queue.popleft()
                if self._unflushed is None:
                    self._unflushed = number
            self._handle(snapshot)
            del snapshot  # while this thread waits, it keeps no tensors alive
            if not self._queue or time.monotonic() - last_flush > _FLUSH_SECONDS:
                for sink in list(self._sinks):
                    self._attempt(sink, sink.flush)
                last_flush = time.monotonic()
                with self._changed:
                    self._unflushed = None
                    self._changed.notify_all()
        for sink in list(self._sinks):
            self._attempt(sink, sink.close)

    def _handle(self, snapshot: Callable[[], Publication | None]) -> None:
        try:
            publication = snapshot()
        except Exception as error:
            if not self._warned_unreadable:
                self._warned_unreadable = True
                _logger.warning("Publisher: a publication could not be made: %r", error)
            return
        if publication is None:  # steps, handed over between two publications
            return
        dropped = self._dropped
        if dropped != self._reported:
            self._reported = dropped
            scalars = {**publication.scalars, DROPPED_TAG: float(dropped)}
            publication = replace(publication, scalars=scalars)
        for sink in list(self._sinks):
            self._attempt(sink, lambda sink=sink: sink.write(publication))  # type: ignore[misc]

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> None:
        """Run `action` of `sink`; if it raises, warn and use the sink no more."""
        try:
            action()
        except Exception as error:
            # Logged, not warned: a warning turned into an error would end this thread.
            _logger.warning(
                "Publisher: %s is switched off, training goes on: %r", type(sink).__name__, error
            )
            self._sinks.remove(sink)
            with contextlib.suppress(Exception):  # its first failure is the one worth reading
                sink.close()
