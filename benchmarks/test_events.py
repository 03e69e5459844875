"""6,000 histograms (2,000 parameters; gradients, parameters, updates), on both axes, into a file.

What counts is how long the GIL is held: for as long, the training thread stands still. It is
measured by a thread that does nothing but look at the clock.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from histogram_reference import BucketTable, histograms_of, log10_buckets, value_buckets
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary
from tensorboardX.record_writer import RecordWriter

from pyvizllm.ops import BINS
from pyvizllm.telemetry import HistogramTable, Publication, TensorBoardSink
from pyvizllm.telemetry.summary import log10_tag

PARAMETERS = 2000
_GAP = 20e-6  # seconds between two looks at the clock: many times what a look takes


def gil_milliseconds(function: Callable[[], object]) -> float:
    """Milliseconds for which another Python thread stood still while `function` ran.

    An upper bound: on a machine without an idle processor, or with other work to do, that thread
    stands still for other reasons too. Only a quiet machine of two processors or more will do.
    """
    # Whoever wants the GIL back waits so long for it: 5 ms each time, where nothing is set, for
    # code that takes it thousands of times.
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_GAP)
    stop, ready, gaps = threading.Event(), threading.Event(), []

    def look() -> None:
        last = time.perf_counter()
        ready.set()
        looking = True
        while looking:
            looking = not stop.is_set()  # once more after the end: it may have been held until then
            now = time.perf_counter()
            if now - last > _GAP:
                gaps.append(now - last)
            last = now

    thread = threading.Thread(target=look)
    thread.start()
    ready.wait()
    try:
        function()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(usual)
    return 1e3 * sum(gaps)


@pytest.fixture(scope="module")
def tables() -> list[HistogramTable]:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(PARAMETERS, 10_000)).astype(np.float32)
    values *= 10.0 ** generator.uniform(-6, 0, size=(PARAMETERS, 1)).astype(np.float32)
    wide = values.astype(np.float64)
    moments = np.stack((wide.min(1), wide.max(1), wide.sum(1), (wide**2).sum(1)), axis=1)
    bins = (values.view(np.uint32) >> 20).astype(np.int64)
    counts = np.stack([np.bincount(row, minlength=BINS) for row in bins])
    names = [f"transformer.h.{i // 16}.{i % 16}.weight" for i in range(PARAMETERS)]
    return [
        HistogramTable(tuple(f"{kind}/{name}" for name in names), counts, moments)
        for kind in ("grad", "param", "update")
    ]


def both_axes(tables: list[HistogramTable]) -> Iterator[tuple[list[str], BucketTable]]:
    for table in tables:
        histograms = histograms_of(table)
        yield list(table.tags), value_buckets(histograms)
        yield [log10_tag(tag) for tag in table.tags], log10_buckets(histograms)


def numpy_and_protobuf(tables: list[HistogramTable], path: Path) -> None:
    """The same buckets by numpy, protobuf and tensorboardX's record writer."""
    summary = Summary()
    for tags, buckets in both_axes(tables):
        for i, tag in enumerate(tags):
            begin, end = buckets.offsets[i : i + 2]
            histo = HistogramProto(
                min=buckets.min[i],
                max=buckets.max[i],
                num=buckets.num[i],
                sum=buckets.sum[i],
                sum_squares=buckets.sum_squares[i],
                bucket_limit=buckets.limits[begin:end].tolist(),
                bucket=buckets.counts[begin:end].tolist(),
            )
            summary.value.add(tag=tag, histo=histo)
    writer = RecordWriter(str(path))
    writer.write(Event(wall_time=1e9, step=1, summary=summary).SerializeToString())
    writer.close()


def add_histogram_raw(tables: list[HistogramTable], folder: Path) -> None:
    """What a user of tensorboardX would call, until everything is in its file."""
    with SummaryWriter(str(folder)) as writer:
        for tags, buckets in both_axes(tables):
            for i, tag in enumerate(tags):
                begin, end = buckets.offsets[i : i + 2]
                writer.add_histogram_raw(
                    tag,
                    min=buckets.min[i],
                    max=buckets.max[i],
                    num=buckets.num[i],
                    sum=buckets.sum[i],
                    sum_squares=buckets.sum_squares[i],
                    bucket_limits=buckets.limits[begin:end].tolist(),
                    bucket_counts=buckets.counts[begin:end].tolist(),
                    global_step=1,
                )


@pytest.mark.parametrize("clock", ["gil", "elapsed"])
def test_6000_histograms(compare, tables, tmp_path, clock):
    def ours() -> None:  # a new file each time: with every description
        sink = TensorBoardSink(tmp_path / "ours")
        sink.write(Publication(1, 1e9, histograms=tables))
        sink.close()
        sink.path.unlink()

    def by_numpy() -> None:
        numpy_and_protobuf(tables, tmp_path / "by_numpy")

    def by_tensorboardx() -> None:
        add_histogram_raw(tables, tmp_path / "raw")

    what = "GIL held while" if clock == "gil" else "until"
    compare(
        f"{what} 6,000 histograms are written on both axes",
        ("TensorBoardSink", ours),
        {"numpy and protobuf": by_numpy, "tensorboardX add_histogram_raw": by_tensorboardx},
        rounds=3,
        target={"numpy and protobuf": "under 20 ms"} if clock == "gil" else {},
        **({"clock": gil_milliseconds} if clock == "gil" else {}),
    )
