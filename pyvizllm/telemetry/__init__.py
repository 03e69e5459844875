"""Statistics of a training run: collected on the device, published by a thread of their own."""

from pyvizllm.telemetry.event_file import TensorBoardSink
from pyvizllm.telemetry.jsonl import JsonlSink, read_history
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.recorder import Recorder
from pyvizllm.telemetry.records import HistogramTable, Publication
from pyvizllm.telemetry.shutdown import Shutdown
from pyvizllm.telemetry.sinks import HistorySink, Sink
from pyvizllm.telemetry.terminal import TerminalSink

__all__ = [
    "HistogramTable",
    "HistorySink",
    "JsonlSink",
    "Publication",
    "Publisher",
    "Recorder",
    "Shutdown",
    "Sink",
    "TensorBoardSink",
    "TerminalSink",
    "read_history",
]
