"""Statistics of a training run: collected on the device, published by a thread of their own."""

from pyvizllm.telemetry.event_file import TensorBoardSink
from pyvizllm.telemetry.flight_recorder import Flight, load_flight
from pyvizllm.telemetry.jsonl import JsonlSink, read_history
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.records import Finding, HistogramTable, Publication, Steps
from pyvizllm.telemetry.shutdown import Shutdown
from pyvizllm.telemetry.sinks import HistorySink, Sink
from pyvizllm.telemetry.terminal import TerminalSink
from pyvizllm.telemetry.watch import watch
from pyvizllm.telemetry.watch_handle import Watch

__all__ = [
    "Finding",
    "Flight",
    "HistogramTable",
    "HistorySink",
    "JsonlSink",
    "Publication",
    "Publisher",
    "Shutdown",
    "Sink",
    "Steps",
    "TensorBoardSink",
    "TerminalSink",
    "Watch",
    "load_flight",
    "read_history",
    "watch",
]
