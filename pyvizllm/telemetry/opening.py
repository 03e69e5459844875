"""A watch put together: its files, its thread, and what hears of the optimizer's steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from pyvizllm.telemetry.engine import Engine
from pyvizllm.telemetry.event_file import TensorBoardSink
from pyvizllm.telemetry.folder import remove_empty
from pyvizllm.telemetry.jsonl import HISTORY, JsonlSink
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.records import KINDS, STATISTICS, Kind, Publication
from pyvizllm.telemetry.sinks import Sink
from pyvizllm.telemetry.step_buffer import MOST_STEPS
from pyvizllm.telemetry.watch_handle import Watch

_QUEUE_BYTES = 2**28
_logger = logging.getLogger("pyvizllm")


def open_watch(
    names: WatchedNames,
    optimizers: Sequence[Optimizer] | None,
    engine: Engine,
    overhead: Overhead,
    folder: Path,
    *,
    histograms: Sequence[Kind],
    statistics: bool = True,
    start_step: int = 0,
    hparams: Mapping[str, bool | float | str] | None = None,
    texts: Mapping[str, str] | None = None,
    graph: tuple[nn.Module, tuple[Tensor, ...]] | None = None,
    sinks: Sequence[Sink] = (),
) -> Watch:
    """A watch that writes into `folder`; its arguments have been checked.

    Arguments:
        names: the watched parameters and their names.
        optimizers: those to watch; None for all that step those parameters.
        engine: what runs on the publisher's thread.
        overhead: how often to measure and publish.
        folder: of the run, made if it is missing.
        histograms: the kinds that are counted.
        statistics: whether to measure anything.
        start_step: the last step done before; TensorBoard forgets the later ones of the folder.
        hparams, texts: shown once.
        graph: a model and what to call it with, to show its graph; it is read at once.
        sinks: where to publish beside the files.

    Raises:
        OSError: the folder cannot be written. Nothing is left behind then; `sinks` are closed.
    """
    with ExitStack() as undo:  # what raises here leaves nothing behind
        undo.callback(remove_empty, [f for f in (folder, *folder.parents) if not f.exists()])
        with ExitStack() as given:  # until the publisher has them
            for sink in sinks:
                given.callback(sink.close)
            board = TensorBoardSink(folder, purge_step=start_step + 1 if start_step > 0 else None)
            undo.callback(board.discard)
            lines = JsonlSink(folder / HISTORY)
            undo.callback(lines.discard)
            if graph is not None:
                _show_graph(board, *graph)
            publisher = Publisher([board, lines, *sinks], _queue_size(len(names)))
            undo.callback(publisher.close)
            given.pop_all()
        watch = Watch(
            names,
            optimizers,
            publisher,
            engine.make_assembler,
            diagnosing=engine.diagnosing,
            overhead=overhead,
            histograms=histograms,
            statistics=statistics,
            start_step=start_step,
            logdir=folder,
        )
        undo.pop_all()
    if hparams is not None or texts:
        first = Publication(start_step, time.time(), texts=texts or {}, hparams=hparams)
        publisher.submit(lambda: first)
    return watch


def _queue_size(parameters: int) -> int:
    """How many snapshots may wait for a slow disk: 256 MiB of statistics, and at least 8."""
    largest = MOST_STEPS * len(KINDS) * len(STATISTICS) * 8 * max(1, parameters)
    return max(8, min(1024, _QUEUE_BYTES // largest))


def _show_graph(board: TensorBoardSink, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        board.write_graph(model, inputs)
    except Exception as error:  # whatever the model's forward raises under a tracer
        _logger.warning("watch: the model's graph cannot be traced: %s", error)
