"""A file that grows by whole records, whatever the disk does."""

import contextlib
import logging
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

_MAX_WAITING = 256 << 20  # bytes
_logger = logging.getLogger("pyvizllm")


class AppendFile:
    """Appends groups of records to a file; those that the disk refuses wait in memory.

    A record is one `os.write`: a reader or a kill in between sees it whole or not at all. What a
    full disk took of one is cut off again, so that the file can be read and goes on when the disk
    does. Where the file was deleted, a new one is begun. One thread at a time may use it; a forked
    child has to leave it alone.

    Arguments:
        path: the file; its folder is made if it is missing.
        begin: makes the records that are written whenever the file is opened.
    Raises:
        OSError: the file cannot be opened, or its beginning not be written.
    """

    def __init__(self, path: Path, begin: Callable[[], Iterable[bytes]]) -> None:
        self.path = path
        self.dropped = 0  # groups lost, because too much waited
        self._begin = begin
        self._waiting: deque[list[bytes]] = deque()
        self._waiting_bytes = 0
        self._descriptor = -1
        self._new = not path.exists()
        self._open()

    @property
    def waiting(self) -> int:
        """How many groups the disk has not taken yet."""
        return len(self._waiting)

    def append(self, records: Iterable[bytes]) -> None:
        """Write a group of records after all that wait.

        Raises OSError where the disk refuses; the group then waits for the next call of `append`
        or `flush`. While more than 256 MiB wait, the oldest groups are dropped.
        """
        group = list(records)
        self._waiting.append(group)
        self._waiting_bytes += sum(map(len, group))
        try:
            self._drain()
        finally:
            while self._waiting_bytes > _MAX_WAITING and len(self._waiting) > 1:
                self._waiting_bytes -= sum(map(len, self._waiting.popleft()))
                self.dropped += 1

    def flush(self) -> None:
        """Return when everything appended is on disk; OSError where the disk refuses it."""
        self._drain()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush, and close in any case; OSError where the last records could not be written."""
        if self._descriptor < 0:
            return
        try:
            self.flush()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Close, and delete the file if this has made it."""
        with contextlib.suppress(OSError):
            self.close()
        if self._new:
            self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._whole = os.fstat(self._descriptor).st_size  # bytes up to the last record's end
        self._torn = False  # whether there are more
        try:
            for record in self._begin():
                self._write(record)
        except OSError:
            os.close(self._descriptor)
            self._descriptor = -1
            raise

    def _drain(self) -> None:
        if self._descriptor < 0 or self._deleted():
            self._reopen()
        while self._waiting:
            group = self._waiting[0]
            while group:
                self._write(group[0])
                self._waiting_bytes -= len(group.pop(0))
            self._waiting.popleft()

    def _deleted(self) -> bool:
        status = os.fstat(self._descriptor)
        return stat.S_ISREG(status.st_mode) and status.st_nlink == 0

    def _reopen(self) -> None:
        if self._descriptor >= 0:
            _logger.warning("%s was deleted: what follows goes to a new file", self.path)
            os.close(self._descriptor)
            self._descriptor = -1
        self._open()

    def _write(self, record: bytes) -> None:
        """Write a record, in one system call unless the disk is nearly full."""
        self._mend()
        written = 0
        try:
            while written < len(record):
                written += os.write(self._descriptor, memoryview(record)[written:])
        except OSError:
            self._torn = written > 0
            with contextlib.suppress(OSError):  # the next write mends first, or fails as this one
                self._mend()
            raise
        self._whole += len(record)

    def _mend(self) -> None:
        """Cut off what the disk took of a record that it did not take whole."""
        if self._torn:
            os.ftruncate(self._descriptor, self._whole)
            self._torn = False
