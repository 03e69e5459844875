"""TensorBoard event files, written with tensorboardX's protocol buffers and record checksum.

tensorboardX's own writer queues events in a thread of its own, whose `flush()` does not wait for
the queue and whose `add_*` blocks for ever once that thread has died. The Publisher's thread is
the only queue here: an event is framed and written by the thread that calls `write`.
"""

import os
import re
import socket
import struct
import time
import uuid
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import text as text_summary

from pyvizllm.telemetry.descriptions import description
from pyvizllm.telemetry.histogram import BucketTable, log10_buckets, make_histograms, value_buckets
from pyvizllm.telemetry.records import Publication
from pyvizllm.telemetry.sinks import write_all

_LIMITS_FIELD, _COUNTS_FIELD = b"\x32", b"\x3a"  # HistogramProto fields 6 and 7, packed


class TensorBoardSink:
    """Writes publications to a new event file in `logdir`, each as one complete record.

    Every histogram `KIND/NAME` is shown twice: as `KIND/NAME` on the value axis and as
    `KIND_log10/NAME` on the log10|x| axis. One without finite values (or, on the log10 axis,
    without non-zero ones) is left out at that step. Values that are not finite are shown.

    Arguments:
        logdir: folder of the run, made if it is missing.
        purge_step: TensorBoard forgets what earlier files of the folder say about this step and
            later ones: 0 for a fresh run, and the checkpoint's step + 1 on resume. None means 0
            in a folder without event files and otherwise an addition that purges nothing.
    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, logdir: str | os.PathLike[str], purge_step: int | None = None) -> None:
        folder = Path(logdir)
        # TensorBoard reads a folder's files in the order of their names: the nanoseconds keep two
        # files of one second apart and in order; the process and the random part make them unique.
        name = (
            f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
            f".{time.time_ns():020d}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if purge_step is None and not any(folder.glob("*tfevents*")):
                purge_step = 0
            self._file = (folder / name).open("xb", buffering=0)
            try:
                self._write_start(purge_step)
            except OSError:  # a full disk
                self._file.close()
                raise
        except OSError as error:
            raise OSError(
                f"TensorBoardSink: cannot write to the run folder {str(folder)!r}: {error.strerror}"
            ) from error
        self.path = folder / name
        self._described: set[str] = set()

    def write(self, publication: Publication) -> None:
        summary = encode_summary(publication)
        self._describe(summary)
        if len(summary.value):
            self._write_event(
                Event(wall_time=publication.wall_time, step=publication.step, summary=summary)
            )

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def _write_start(self, purge_step: int | None) -> None:
        self._write_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def _describe(self, summary: Summary) -> None:
        """Say once a file what each tag means: TensorBoard keeps what came with the first value."""
        for value in summary.value:
            if value.tag in self._described or not (meaning := description(value.tag)):
                continue
            self._described.add(value.tag)
            value.metadata.summary_description = meaning
            plugin = "histograms" if value.HasField("histo") else "scalars"
            value.metadata.plugin_data.plugin_name = plugin

    def _write_event(self, event: Event) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = struct.pack("<I", masked_crc32c(length)), struct.pack("<I", masked_crc32c(data))
        # One write: a reader or a kill in between sees a whole record or none.
        write_all(self._file.fileno(), b"".join((length, checks[0], data, checks[1])))


def clean_tag(tag: str) -> str:
    """`tag` with everything but letters, digits and `_ - . /` replaced by `_`."""
    return re.sub(r"[^-/\w.]", "_", tag).lstrip("/")


def encode_summary(publication: Publication) -> Summary:
    """All values of a publication as one Summary, scalars first."""
    summary = Summary()
    for tag, value in publication.scalars.items():
        summary.value.add(tag=clean_tag(tag), simple_value=value)
    if publication.histograms:
        tags = [clean_tag(tag) for table in publication.histograms for tag in table.tags]
        histograms = [
            histogram
            for table in publication.histograms
            for histogram in make_histograms(table.counts, *table.moments.T)
        ]
        _add_histograms(summary, tags, value_buckets(histograms))
        _add_histograms(summary, [_log10_tag(tag) for tag in tags], log10_buckets(histograms))
    for tag, text in publication.texts.items():
        summary.value.extend(text_summary(clean_tag(tag), text).value)
    return summary


def _log10_tag(tag: str) -> str:
    kind, slash, name = tag.partition("/")
    return f"{kind}_log10{slash}{name}"


def _add_histograms(summary: Summary, tags: list[str], table: BucketTable) -> None:
    limits, counts = table.limits.astype("<f8").data.cast("B"), table.counts.data.cast("B")
    offsets = (8 * table.offsets).tolist()
    statistics = zip(
        table.min.tolist(),
        table.max.tolist(),
        table.num.tolist(),
        table.sum.tolist(),
        table.sum_squares.tolist(),
        strict=True,
    )
    for i, (low, high, num, total, squares) in enumerate(statistics):
        begin, end = offsets[i], offsets[i + 1]
        if begin == end:
            continue
        histo = HistogramProto(min=low, max=high, num=num, sum=total, sum_squares=squares)
        # The arrays' bytes are the wire format of a packed repeated double: this spares a Python
        # float for each bucket, and with it most of the time that the GIL would be held.
        size = _varint(end - begin)
        histo.MergeFromString(
            b"".join(
                (_LIMITS_FIELD, size, limits[begin:end], _COUNTS_FIELD, size, counts[begin:end])
            )
        )
        summary.value.add(tag=tags[i], histo=histo)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
