"""The thread that turns snapshots into publications and hands them to the sinks.

Training hands over a snapshot (a function) and goes on; whatever is slow or fails happens here.
"""

import atexit
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

from pyvizllm.telemetry.outlet import Outlet
from pyvizllm.telemetry.records import Publication
from pyvizllm.telemetry.sinks import Sink

DROPPED_TAG = "pyvizllm/dropped"
_FLUSH_SECONDS = 1.0  # at most this long between a publication and its fsync
_logger = logging.getLogger("pyvizllm")

Snapshot = Callable[[], Publication | None]
_Request = tuple[int, "SimpleQueue[bool]"]  # flush up to this number, and answer


class Publisher:
    """A bounded queue and one daemon thread; it never blocks and never stops the training.

    When the queue is full the oldest snapshot is dropped; the number dropped so far is published as
    `pyvizllm/dropped` with the next publication. A sink that raises an OSError (a full disk, a
    folder that is gone) is asked again later; one that raises anything else is switched off; each
    with one logged warning, and the others go on. What is queued at the end of the program is
    still written. In a forked child every method does nothing: the files and the thread are the
    parent's.

    Arguments:
        sinks: where publications go, called by the thread only.
        queue_size: the most snapshots that wait.
    """

    # A signal's handler may call `close` or `flush` wherever the training thread stands, within
    # `submit` too. So the publisher's thread takes no lock that the training thread can hold: a
    # deque's and a SimpleQueue's methods are atomic.

    def __init__(self, sinks: Sequence[Sink], queue_size: int = 64) -> None:
        if queue_size < 1:
            raise ValueError(f"Publisher: expected queue_size of at least 1, got {queue_size}")
        self._outlets = [Outlet(sink) for sink in sinks]
        self._queue: deque[tuple[int, Snapshot]] = deque()
        self._queue_size = queue_size
        self._submitting = threading.RLock()  # between training threads, where there are several
        self._wake: SimpleQueue[_Request | None] = SimpleQueue()
        self._submitted = 0  # the number of the last snapshot accepted
        self._unflushed = 0  # how many the thread has taken that are not yet on disk
        self._dropped = 0
        self._unreadable = 0  # how many raised, by the thread's own count
        self._reported = 0  # the number of drops that the sinks have been told
        self._closing = False
        # By those who wait, since when: readings of time.monotonic. Each change is one operation.
        self._awaiting: dict[object, float] = {}
        self._warned_unreadable = self._warned_closed = self._warned_dropping = False
        self._flush_at = math.inf  # a reading of time.monotonic
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="pyvizllm-publisher", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """How many snapshots and publications were dropped so far, or could not be made."""
        return self._dropped + self._unreadable + sum(outlet.dropped for outlet in self._outlets)

    @property
    def is_behind(self) -> bool:
        """Whether half of the queue is full: what can be put off should be."""
        return 2 * len(self._queue) >= self._queue_size

    @property
    def awaited_since(self) -> float | None:
        """Since when somebody waits in `flush` or `close`: who makes this thread wait should know.

        A reading of time.monotonic; None while nobody does.
        """
        return min(tuple(self._awaiting.values()), default=None)

    def submit(self, snapshot: Snapshot) -> None:
        """Queue `snapshot`, which the thread will call; never waits for the thread's work.

        It returns what to publish, or None where there is nothing to show.
        """
        if os.getpid() != self._pid:  # before the lock: the fork may have copied it locked
            return
        with self._submitting:
            if self._closing:
                self._dropped += 1
                if not self._warned_closed:
                    self._warned_closed = True
                    _logger.warning("Publisher.submit: already closed, nothing more is written")
                return
            if len(self._queue) >= self._queue_size and self._take() is not None:
                self._dropped += 1
                if not self._warned_dropping:
                    self._warned_dropping = True
                    message = "Publisher: more comes than can be written, the oldest is dropped"
                    _logger.warning("%s; %s counts how much", message, DROPPED_TAG)
            self._submitted += 1
            self._queue.append((self._submitted, snapshot))
            if len(self._queue) == 1:  # otherwise the thread has not yet seen the queue empty
                self._wake.put(None)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything submitted so far is on disk.

        Returns False if `timeout` seconds pass, or if a disk refuses what waits for it.
        """
        if os.getpid() != self._pid:
            return True
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        reply: SimpleQueue[bool] = SimpleQueue()
        try:
            self._awaiting[reply] = time.monotonic()
            self._wake.put((self._submitted, reply))
            while self._thread.is_alive():
                remaining = deadline - time.monotonic()
                try:
                    return reply.get(timeout=min(1.0, max(0.0, remaining)))
                except Empty:
                    if remaining <= 0:
                        return False
            return all(outlet.settled for outlet in self._outlets)
        finally:
            self._awaiting.pop(reply, None)

    def close(self, timeout: float | None = 60.0) -> None:
        """Write what is queued, close the sinks and end the thread.

        A sink that hangs is given up after `timeout` seconds, with a warning.
        """
        if os.getpid() != self._pid:
            return
        self._closing, self._awaiting[self] = True, time.monotonic()
        self._wake.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            message = "Publisher.close: gave up after %s s, %d publications are not on disk"
            _logger.warning(message, timeout, len(self._queue) + self._unflushed)
        atexit.unregister(self.close)

    def _take(self) -> Snapshot | None:
        """The oldest snapshot of the queue, which both threads shorten."""
        try:
            return self._queue.popleft()[1]
        except IndexError:
            return None

    def _run(self) -> None:
        requests: list[_Request] = []
        while not (self._closing and not self._queue):
            requests += self._wait()
            while (snapshot := self._take()) is not None:
                self._unflushed += 1
                self._flush_at = min(self._flush_at, time.monotonic() + _FLUSH_SECONDS)
                self._handle(snapshot)
                del snapshot  # while this thread waits, it keeps no tensors alive
                requests = self._settle(requests + self._new_requests())
            requests = self._settle(requests)
        for outlet in self._outlets:
            outlet.close()
        self._answer(requests + self._new_requests())

    def _wait(self) -> list[_Request]:
        """Wait for a snapshot, a request, or the time to flush or to ask a disk again."""
        retries = [outlet.retry_at for outlet in self._outlets if outlet.retry_at is not None]
        until = min([self._flush_at, *retries])
        timeout = None if until == math.inf else max(0.0, until - time.monotonic())
        try:
            request = self._wake.get(timeout=timeout)
        except Empty:
            return []
        return self._new_requests() if request is None else [request, *self._new_requests()]

    def _new_requests(self) -> list[_Request]:
        requests: list[_Request] = []
        while True:
            try:
                request = self._wake.get_nowait()
            except Empty:
                return requests
            if request is not None:
                requests.append(request)

    def _settle(self, requests: list[_Request]) -> list[_Request]:
        """Flush if it is time or somebody waits for it; returns the requests that still wait."""
        try:
            oldest: float = self._queue[0][0]
        except IndexError:
            oldest = math.inf
        due = [request for request in requests if request[0] < oldest]
        now = time.monotonic()
        if self._closing and self._queue:
            return requests  # the process may not live long: all is written before it is flushed
        if due or now >= self._flush_at:
            for outlet in self._outlets:
                outlet.flush()
            self._unflushed, self._flush_at = 0, math.inf
            self._answer(due)
        else:
            for outlet in self._outlets:
                if outlet.retry_at is not None and now >= outlet.retry_at:
                    outlet.flush()
        return [request for request in requests if request[0] >= oldest]

    def _answer(self, requests: Sequence[_Request]) -> None:
        settled = all(outlet.settled for outlet in self._outlets)
        for _, reply in requests:
            reply.put(settled)

    def _handle(self, snapshot: Snapshot) -> None:
        try:
            publication = snapshot()
        except Exception as error:
            self._unreadable += 1
            if not self._warned_unreadable:
                self._warned_unreadable = True
                _logger.warning("Publisher: a publication could not be made: %r", error)
            return
        if publication is None:
            return
        dropped = self.dropped
        if dropped != self._reported:
            self._reported = dropped
            scalars = {**publication.scalars, DROPPED_TAG: float(dropped)}
            publication = replace(publication, scalars=scalars)
        for outlet in self._outlets:
            outlet.write(publication)
