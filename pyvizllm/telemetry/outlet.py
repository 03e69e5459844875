"""One sink as the Publisher sees it: working, waiting for its disk, or switched off."""

import contextlib
import logging
import time
from collections.abc import Callable

from pyvizllm.telemetry.records import Publication
from pyvizllm.telemetry.sinks import Sink

_FIRST_RETRY, _LONGEST_RETRY = 0.25, 10.0  # seconds
_logger = logging.getLogger("pyvizllm")


class Outlet:
    """Calls a sink so that nothing it raises comes through.

    After an OSError it is asked again, later and later, and with every write, until a flush says
    that all is on disk; any other exception switches it off. Each outage is one logged warning.
    (Logged, not warned: a warning turned into an error would end the thread.)
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.retry_at: float | None = None  # a reading of time.monotonic, while the disk refuses
        self._name = type(sink).__name__
        self._on = True
        self._delay = _FIRST_RETRY

    @property
    def dropped(self) -> int:
        """How many publications the sink gave up because its disk refused them for too long."""
        return int(getattr(self.sink, "dropped", 0))

    @property
    def settled(self) -> bool:
        """True unless something waits for the sink's disk."""
        return self.retry_at is None

    def write(self, publication: Publication) -> None:
        """Hand a publication to the sink."""
        self._attempt(lambda: self.sink.write(publication))

    def flush(self) -> None:
        """Bring everything handed out, what waits included, to the disk."""
        if self._attempt(self.sink.flush) and self.retry_at is not None:
            self.retry_at = None
            _logger.info("Publisher: %s writes again", self._name)

    def close(self) -> None:
        """Close the sink; what its disk refuses now is lost."""
        if not self._on:
            return
        self._on = False
        try:
            self.sink.close()
        except Exception as error:
            _logger.warning("Publisher: %s could not write its last records: %r", self._name, error)

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Whether the action was done."""
        if not self._on:
            return False
        try:
            action()
        except OSError as error:
            self._wait(error)
        except Exception as error:
            message = "Publisher: %s is switched off, training goes on: %r"
            _logger.warning(message, self._name, error)
            self._on, self.retry_at = False, None
            with contextlib.suppress(Exception):  # its first failure is the one worth reading
                self.sink.close()
        else:
            return True
        return False

    def _wait(self, error: OSError) -> None:
        now = time.monotonic()
        if self.retry_at is None:
            message = "Publisher: %s waits for its disk, training goes on: %r"
            _logger.warning(message, self._name, error)
            self._delay = _FIRST_RETRY
            self.retry_at = now + self._delay
        elif now >= self.retry_at:
            self._delay = min(2 * self._delay, _LONGEST_RETRY)
            self.retry_at = now + self._delay
