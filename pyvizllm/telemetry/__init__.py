"""Statistics of a training run: collected on the device, published by a thread of their own."""

from pyvizllm.telemetry.event_file import TensorBoardSink
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.records import Finding, HistogramTable, Publication, Steps
from pyvizllm.telemetry.sinks import HistorySink, JsonlSink, Sink
from pyvizllm.telemetry.watch import Watch, watch

__all__ = [
    "Finding",
    "HistogramTable",
    "HistorySink",
    "JsonlSink",
    "Publication",
    "Publisher",
    "Sink",
    "Steps",
    "TensorBoardSink",
    "Watch",
    "watch",
]
