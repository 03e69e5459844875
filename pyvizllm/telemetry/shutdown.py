"""What happens to a run's telemetry when the process is told to end, or training fails."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from types import FrameType

from pyvizllm.telemetry.publisher import Publisher

_SECONDS = 10.0  # a cluster kills for good some 30 s after its SIGTERM
_logger = logging.getLogger("pyvizllm")

_Handler = Callable[[int, FrameType | None], object] | int | None


def _no() -> bool:
    return False


class Shutdown:
    """Brings everything to the disk on SIGTERM, and at an exit by an unhandled exception.

    An unhandled exception ends a thread alone: where that is the one that trains, likewise.

    The handler of SIGTERM, which only the main thread can install, calls the callbacks, flushes
    the publisher and passes the signal on: to the Python handler that was there before (which may
    decide to go on), or, by default, to the system, so that the exit status is that of SIGTERM. A
    process that ignores SIGTERM goes on ignoring it. In a forked child the signal is passed on
    and nothing else. Several of these in one process call each other.

    Arguments:
        publisher: flushed after the callbacks, for 10 s at most.
        callbacks: called at most once, each with the reason: "SIGTERM" or "exception: ...". They
            may submit to the publisher. What they raise is logged.
        busy: whether the signal has interrupted what the callbacks need complete; it then waits
            for `resume`.
        trains: whether the thread that calls it is the one that trains.
    Example:
        shutdown = Shutdown(publisher, [flight_recorder.dump])
        ...
        shutdown.close()
    """

    def __init__(
        self,
        publisher: Publisher,
        callbacks: Sequence[Callable[[str], None]] = (),
        busy: Callable[[], bool] = _no,
        trains: Callable[[], bool] = _no,
    ) -> None:
        self._publisher = publisher
        self._callbacks, self._busy, self._trains = list(callbacks), busy, trains
        self._waiting: tuple[int, FrameType | None] | None = None
        self._pid = os.getpid()
        self._active = True
        self._handler = self._on_signal  # one object, to know it again
        self._previous: _Handler = None
        if threading.current_thread() is threading.main_thread():
            self._install()
        atexit.register(self._at_exit)
        _open[self] = None
        _hook_threads()

    def notify(self, reason: str) -> None:
        """Call the callbacks, unless that was done, and flush the publisher."""
        if os.getpid() != self._pid:
            return
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(reason)
            except Exception as error:
                _logger.warning("Shutdown: %r failed: %r", callback, error)
        self._publisher.flush(_SECONDS)

    def close(self) -> None:
        """Do nothing any more, and keep nothing alive; the previous handler is put back.

        Where a handler of somebody else's was installed after ours, or in another thread than the
        main one, ours stays, and passes on.
        """
        self._active = False
        self._callbacks, self._busy, self._trains = [], _no, _no
        _open.pop(self, None)
        atexit.unregister(self._at_exit)
        current = signal.getsignal(signal.SIGTERM)
        if current is self._handler:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._previous)
            return
        while (later := _owner(current)) is not None:
            if later._previous is self._handler:
                later._previous = self._previous
            current = later._previous

    def resume(self) -> None:
        """Let a signal that has waited take its course."""
        if self._waiting is not None:
            signal_and_frame, self._waiting = self._waiting, None
            self._on_signal(*signal_and_frame)

    def _install(self) -> None:
        previous = signal.getsignal(signal.SIGTERM)
        while (earlier := _owner(previous)) is not None and not earlier._active:
            previous = earlier._previous  # closed by another thread, which had to leave it there
        if previous is None or previous == signal.SIG_IGN:  # None: not from Python, not ours
            return
        self._previous = previous
        signal.signal(signal.SIGTERM, self._handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._active and self._busy():
            self._waiting = number, frame
            return
        if self._active:
            self.notify("SIGTERM")
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _at_exit(self) -> None:
        interactive = hasattr(sys, "ps1")  # there an exception ends nothing
        error = getattr(sys, "last_value", None)
        if error is not None and not interactive:
            self.notify(f"exception: {error!r}")

    def _in_thread(self, error: BaseException | None) -> None:
        if self._trains() and not isinstance(error, SystemExit):
            self.notify(f"exception: {error!r}")


_open: dict[Shutdown, None] = {}
"""All that are, for the one hook; each change, and the copy to iterate over, is one operation."""


@cache
def _hook_threads() -> None:
    """Once for the process, and for good: so no hook of somebody else's is ever undone."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        try:
            for shutdown in tuple(_open):
                shutdown._in_thread(arguments.exc_value)
        finally:  # an exception may have a __repr__ that fails
            before(arguments)

    threading.excepthook = hook


def _owner(handler: _Handler) -> Shutdown | None:
    """Whose handler it is; None of somebody else's."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Shutdown) else None
