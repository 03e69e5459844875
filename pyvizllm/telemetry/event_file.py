"""TensorBoard event files: a publication as tensorboardX's protocol buffers, record by record.

tensorboardX's own writer queues events in a thread of its own, whose `flush()` does not wait for
the queue and whose `add_*` blocks for ever once that thread has died. The Publisher's thread is
the only queue here: a record is made and written by the thread that calls `write`.
"""

import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pyvizllm.ops._extension import load
from pyvizllm.telemetry.append_file import AppendFile
from pyvizllm.telemetry.dashboard import Dashboard
from pyvizllm.telemetry.descriptions import description
from pyvizllm.telemetry.records import HistogramTable, Publication
from pyvizllm.telemetry.summary import (
    clean_tag,
    hparams_values,
    layout_value,
    log10_tag,
    passing_values,
)

load("pyvizllm._events")  # says what to do where it was never built
from pyvizllm import _events  # noqa: E402

_RECORD_BYTES = 4 << 20  # of histograms: a kill tears at most one record


class TensorBoardSink:
    """Writes publications to a new event file in `logdir`, in complete records.

    Every histogram `KIND/NAME` is shown twice: as `KIND/NAME` on the value axis and as
    `KIND_log10/NAME` on the log10|x| axis. One without finite values (or, on the log10 axis,
    without non-zero ones) is left out at that step. Values that are not finite are shown. Findings
    are texts under `diagnosis/RULE`.

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
        self._purge_step = purge_step
        self._described: set[str] = set()
        # Serialised values that belong to the run, not to a step.
        self._hparams = self._layout = b""
        try:
            goes_on = any(folder.glob("*tfevents*"))
            if purge_step is None and not goes_on:
                self._purge_step = 0
            self._dashboard = Dashboard(all_charts=goes_on)
            self._file = AppendFile(folder / _unique_name(), self._begin)
        except OSError as error:
            raise OSError(
                f"TensorBoardSink: cannot write to the run folder {str(folder)!r}: {error.strerror}"
            ) from error

    @property
    def path(self) -> Path:
        """The event file."""
        return self._file.path

    @property
    def dropped(self) -> int:
        """How many publications were lost, because too many waited for the disk."""
        return self._file.dropped

    def write(self, publication: Publication) -> None:
        """Write a publication; after an OSError it waits for the next `write` or `flush`."""
        records = self._encode(publication)
        try:
            if records:
                self._file.append(records)
        except OSError:
            self._described.clear()  # should the descriptions be among what is dropped
            raise

    def write_graph(self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Show the model's graph, as traced with `inputs`; before a Publisher gets this sink.

        Raises RuntimeError for a model that torch.jit.trace cannot trace.
        """
        from torch.utils.tensorboard._pytorch_graph import graph  # as tensorboardX does: 1 s

        modes = [(module, module.training) for module in model.modules()]
        try:
            with warnings.catch_warnings(), torch.no_grad():
                # That torch.jit.trace is deprecated, and what a trace would not do for other
                # inputs: it is only looked at.
                warnings.simplefilter("ignore")
                definition, _ = graph(model, inputs)
        finally:
            for module, training in modes:  # torch gives all of them the model's own mode
                module.training = training
        event = Event(wall_time=time.time(), graph_def=definition.SerializeToString())
        self._file.append([_events.record(event.SerializeToString())])

    def flush(self) -> None:
        """Return when everything written is on disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def discard(self) -> None:
        """Close, and delete the file if this has made it."""
        self._file.discard()

    def _begin(self) -> Iterator[bytes]:
        self._described.clear()
        start = Event(wall_time=time.time(), file_version="brain.Event:2")
        yield _events.record(start.SerializeToString())
        if self._purge_step is not None:
            session = SessionLog(status=SessionLog.START)
            purge = Event(wall_time=time.time(), step=self._purge_step, session_log=session)
            yield _events.record(purge.SerializeToString())
        if self._hparams or self._layout:
            yield _events.summary_record(time.time(), 0, self._hparams + self._layout)

    def _encode(self, publication: Publication) -> list[bytes]:
        """A publication's records: one of all but the histograms, then those."""
        # Serialised Summaries one after the other are one Summary.
        summary = self._lasting(publication) + self._scalars(publication.scalars)
        summary += passing_values(publication)
        where = publication.wall_time, publication.step
        records = [_events.summary_record(*where, summary)] if summary else []
        for table in publication.histograms:
            records += self._histograms(*where, table)
        return records

    def _lasting(self, publication: Publication) -> bytes:
        """What is new of the hyper-parameters and the dashboard."""
        new = b""
        if publication.hparams is not None:
            self._hparams = hparams_values(publication.hparams)
            new += self._hparams
        tags = [clean_tag(tag) for tag in publication.scalars]
        layout = self._dashboard.add(publication.layout, tags)
        if layout is not None:
            self._layout = layout_value(layout)
            new += self._layout
        return new

    def _scalars(self, scalars: Mapping[str, float]) -> bytes:
        tags = [clean_tag(tag) for tag in scalars]
        return _events.scalar_summary(tags, list(scalars.values()), self._describe(tags))

    def _histograms(self, wall_time: float, step: int, table: HistogramTable) -> list[bytes]:
        tags, log10_tags = _axes(table.tags)
        return _events.histogram_records(
            wall_time,
            step,
            tags,
            log10_tags,
            table.counts,
            table.moments,
            self._describe(tags),
            self._describe(log10_tags),
            _RECORD_BYTES,
        )

    def _describe(self, tags: Sequence[str]) -> list[str]:
        """What each tag means, once a file: TensorBoard keeps what came with the first value."""
        if self._described.issuperset(tags):
            return []
        meanings = ["" if tag in self._described else description(tag) for tag in tags]
        self._described.update(tags)
        return meanings


def _unique_name() -> str:
    """A name that sorts after the older ones of its folder, in which order TensorBoard reads.

    The nanoseconds keep two files of one second apart and in order; the rank, the process and the
    random part make them unique.
    """
    rank = os.environ.get("RANK")
    return (
        f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns():020d}"
        f"{'' if rank is None else f'.rank{rank}'}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    )


@lru_cache(maxsize=32)  # the same parameters at every publication
def _axes(tags: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The tags of the value axis and of the log10 axis."""
    cleaned = [clean_tag(tag) for tag in tags]
    return cleaned, [log10_tag(tag) for tag in cleaned]
