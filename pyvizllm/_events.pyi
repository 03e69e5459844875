"""Publications to the bytes of TensorBoard's files (csrc/events); works without the GIL."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def histogram_records(
    wall_time: float,
    step: int,
    tags: Sequence[str],
    log10_tags: Sequence[str],
    counts: NDArray[np.int64],
    moments: NDArray[np.float64],
    descriptions: Sequence[str],
    log10_descriptions: Sequence[str],
    limit: int,
) -> list[bytes]:
    """Framed records of the histograms of T tensors, on the value axis and on the log10|x| axis.

    `tags` and `log10_tags` [T] are the two axes'; their descriptions are [T] too, or empty.
    `counts` [T, 4096] and `moments` [T, 4] are as in HistogramTable, but where a moment is not
    finite all four of the tensor are taken from the bins. A histogram without anything to show is
    left out. A record is an Event with whole histograms, full at `limit` bytes. Raises ValueError
    for other shapes and dtypes.
    """

def scalar_summary(
    tags: Sequence[str], values: Sequence[float], descriptions: Sequence[str]
) -> bytes:
    """A serialised Summary of values, rounded to float32 as TensorBoard's are."""

def summary_record(wall_time: float, step: int, summary: bytes) -> bytes:
    """The framed record of an Event with a serialised Summary."""

def record(event: bytes) -> bytes:
    """The framed record of a serialised Event."""

def crc32c(data: bytes, portable: bool = False) -> int:
    """CRC-32C of `data`, not masked; `portable` without the processor's instruction."""
