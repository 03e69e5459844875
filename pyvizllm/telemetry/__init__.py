"""Statistics of a training run: collected on the device, published by a thread of their own."""

from pyvizllm.telemetry.event_file import TensorBoardSink
from pyvizllm.telemetry.histogram import Histogram
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.recorder import Recorder
from pyvizllm.telemetry.sinks import HistorySink, JsonlSink, Publication, Sink

__all__ = [
    "Histogram",
    "HistorySink",
    "JsonlSink",
    "Publication",
    "Publisher",
    "Recorder",
    "Sink",
    "TensorBoardSink",
]
