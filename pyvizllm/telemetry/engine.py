"""What runs on the publisher's thread of a training, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pyvizllm.telemetry.assembler import MAX_TAGS, Assembler
from pyvizllm.telemetry.diagnosing import Diagnosing
from pyvizllm.telemetry.diagnosis import Diagnosis, DiagnosisOptions, ParameterInfo
from pyvizllm.telemetry.flight_recorder import FlightRecorder
from pyvizllm.telemetry.heatmap import HeatMap
from pyvizllm.telemetry.noise_scale import NoiseScale
from pyvizllm.telemetry.records import Kind
from pyvizllm.telemetry.shards import layout_of
from pyvizllm.telemetry.trajectory import Trajectory


class Engine:
    """Makes the assembler of a run, and keeps what others have to talk to.

    Arguments:
        names: the watched parameters and their names.
        logdir: folder of the run, for the flight recorder and the trajectory; None for no files.
        histograms: the kinds that are shown.
        max_tags: the most tags that TensorBoard gets.
        ignore: the names of rules that are not to be applied.
        shown: whether a sink writes the findings into the terminal.
    """

    def __init__(
        self,
        names: Mapping[Tensor, str],
        logdir: Path | None,
        *,
        histograms: Sequence[Kind],
        max_tags: int = MAX_TAGS,
        ignore: Iterable[str] = (),
        shown: bool = False,
    ) -> None:
        infos = {name: ParameterInfo.of(parameter) for parameter, name in names.items()}
        diagnosis = Diagnosis(DiagnosisOptions(parameters=infos, off=frozenset(ignore)))
        recorder = None if logdir is None else FlightRecorder(diagnosis.history, logdir)
        self.diagnosing = Diagnosing(diagnosis, recorder, shown=shown)
        self._layout = layout_of(names)
        self._histograms, self._max_tags, self._logdir = tuple(histograms), max_tags, logdir

    @property
    def make_assembler(self) -> Callable[[Sequence[str]], Assembler]:
        """Called with the parameters' names once they are known."""
        return lambda names: Assembler(
            names,
            histograms=self._histograms,
            max_tags=self._max_tags,
            trajectory=Trajectory(self._logdir, self._layout),
            parts=[HeatMap(), NoiseScale(), self.diagnosing],
        )
