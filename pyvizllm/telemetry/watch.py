"""`watch`: telemetry in anybody's training loop."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pyvizllm.ops import CrossEntropyMetrics
from pyvizllm.ops.clip_grad_norm import observers
from pyvizllm.telemetry.diagnosing import Diagnosing
from pyvizllm.telemetry.engine import Engine
from pyvizllm.telemetry.event_file import TensorBoardSink
from pyvizllm.telemetry.jsonl import JsonlSink
from pyvizllm.telemetry.names import Patterns, WatchedNames
from pyvizllm.telemetry.observer import StepObserver
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.publishing import Assembling
from pyvizllm.telemetry.recorder import Recorder, squared_norms
from pyvizllm.telemetry.records import KINDS, Kind, Publication
from pyvizllm.telemetry.shutdown import Shutdown
from pyvizllm.telemetry.sinks import Sink
from pyvizllm.telemetry.step_buffer import MicroBatch
from pyvizllm.telemetry.terminal import TerminalSink
from pyvizllm.telemetry.watch_arguments import check, count, json_block, optimizers_of, scalar

HISTORY = "history.jsonl"
_PATIENCE = 10.0  # seconds that `close` gives a slow disk before it gives up its last histograms
_logger = logging.getLogger("pyvizllm")
Result = TypeVar("Result")


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    logdir: str | os.PathLike[str] | None = None,
    *,
    every: int = 50,
    include: Patterns = None,
    exclude: Patterns = None,
    histograms: Sequence[Kind] = KINDS,
    max_overhead: float | None = None,
    max_tags: int = 2000,
    start_step: int = 0,
    hparams: Mapping[str, bool | float | str] | None = None,
    config: Mapping[str, Any] | None = None,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    terminal: bool = False,
    sinks: Sequence[Sink] = (),
) -> Watch:
    """Watch every parameter of `model` at every step of `optimizer`; the loop stays as it is.

    Statistics are taken by the optimizer's step hooks, on the device, and published by a thread of
    their own. The training never waits for them: no device value is read for them, and whatever
    goes wrong with them is logged once and leaves the training alone.

    Gradients are unscaled, accumulated, and those before clipping where `pyvizllm.clip_grad_norm_`
    clips; after any other clipping they are those that the optimizer got, and are called so.
    Gradients are measured and counted in every step. With `pyvizllm.AdamW` updates and parameters
    are measured in every step too, in its own pass; with other optimizers, and their histograms
    with any, in the steps that are published.

    Arguments:
        model: the model that is trained; it may be compiled or wrapped.
        optimizer: the optimizer, or all that train the model; None for all that step parameters
            of the model, whenever they are made.
        logdir: folder of the run, for TensorBoard. None: a new one in `runs`.
        every: optimizer steps between two publications, each of which covers all steps since the
            one before.
        include, exclude: regular expressions that are searched in the parameters' names.
        histograms: which of "grad", "param" and "update" get histograms.
        max_overhead: share of the time, such as 0.01, that telemetry may take; it publishes and
            measures less often until that holds. None: as often as asked.
        max_tags: the most tags for TensorBoard; beyond it layers stand for parameters.
        start_step: the last step done before, for a training that goes on.
        hparams: the run's settings, for TensorBoard's table of runs.
        config: whatever JSON can hold, shown as text.
        example_inputs: arguments of a call of the model, to trace its graph with and show it; a
            model that cannot be traced is told in a warning.
        terminal: whether to print a line for each publication, and what is found to be wrong.
        sinks: where to publish beside the TensorBoard and JSON files of `logdir`.

    Returns:
        A `Watch`: `log` adds scalars to a step, `close` (or a `with` block) ends it.

    Raises:
        TypeError, ValueError: a sentence about the argument that is wrong.
        OSError: `logdir` cannot be written.

    Example:
        >>> with pyvizllm.watch(model, optimizer) as w:
        ...     for batch in loader:
        ...         loss = model(batch)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         w.log(loss=loss)
    """
    check(model, every, histograms, max_overhead, max_tags, start_step, hparams, sinks)
    optimizers = None if optimizer is None else optimizers_of(model, optimizer)
    names = WatchedNames(model, include, exclude)
    text = {} if config is None else {"config": json_block(config)}
    if logdir is None:
        unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        logdir = Path("runs") / unique
    board = TensorBoardSink(logdir)
    if example_inputs is not None:
        if isinstance(example_inputs, Tensor):
            example_inputs = (example_inputs,)
        _show_graph(board, model, tuple(example_inputs))
    files: list[Sink] = [board, JsonlSink(Path(logdir) / HISTORY)]
    if terminal:
        files.append(TerminalSink())
    publisher = Publisher([*files, *sinks])
    engine = Engine(names, Path(logdir), histograms=histograms, max_tags=max_tags)
    if hparams is not None or config is not None:
        first = Publication(start_step, time.time(), texts=text, hparams=hparams)
        publisher.submit(lambda: first)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Watch(
        names,
        optimizers,
        publisher,
        engine.make_assembler,
        diagnosing=engine.diagnosing,
        overhead=Overhead(every, max_overhead, device),
        histograms=histograms,
        start_step=start_step,
        logdir=Path(logdir),
    )


class Watch:
    """What `pyvizllm.watch` returns. Its methods never wait for the device, but for `flush`.

    Arguments:
        names: the watched parameters and their names.
        optimizers: those to watch; None for all that step those parameters.
        publisher: where publications go; closed with the watch.
        make_assembler: makes what turns steps into publications.
        diagnosing: dumps the last steps when the process is told to end, or training fails.
        overhead: how often to measure and publish.
        histograms: the kinds that are counted.
        statistics: whether to measure anything; without, steps are counted and logs published.
        start_step: the last step done before.
        logdir: folder of the run.
    """

    def __init__(
        self,
        names: WatchedNames,
        optimizers: Sequence[Optimizer] | None,
        publisher: Publisher,
        make_assembler: Callable[[Sequence[str]], Assembling],
        *,
        diagnosing: Diagnosing | None = None,
        overhead: Overhead,
        histograms: Sequence[Kind] = KINDS,
        statistics: bool = True,
        start_step: int = 0,
        logdir: Path | None = None,
    ) -> None:
        self.logdir, self.publisher = logdir, publisher
        self._overhead = overhead
        self._recorder = Recorder(
            publisher,
            make_assembler,
            overhead,
            names=list(names.values()),
            start_step=start_step,
            **({} if diagnosing is None else {"evaluated": diagnosing.evaluated}),
        )
        self._observer = StepObserver(
            self._recorder,
            overhead,
            names,
            optimizers,
            histograms if statistics else (),
            statistics,
        )
        self._measuring = self._open = True
        # A compiled step calls what is ours as it is: outside of its graph.
        self._outside: Callable[..., Any] = torch.compiler.disable(_call)
        before = torch.compiler.disable(self._before_step)
        after = torch.compiler.disable(self._after_step)
        if optimizers is None:
            self._hooks = [
                register_optimizer_step_pre_hook(before),
                register_optimizer_step_post_hook(after),
            ]
        else:
            self._hooks = [o.register_step_pre_hook(before) for o in optimizers]
            self._hooks += [o.register_step_post_hook(after) for o in optimizers]
        observers.add(self)
        self._diagnosing = diagnosing
        atexit.register(self.close)
        # After the line above, so that at an exit by an exception the dump comes first.
        self._thread: int | None = None  # that records a step
        self._shutdown = Shutdown(
            publisher, [self._on_shutdown], busy=lambda: self._thread == threading.get_ident()
        )

    @property
    def step(self) -> int:
        """The number of optimizer steps done, `start_step` included."""
        return self._recorder.step + self._observer.stepped

    # -- What the loop may say --------------------------------------------------------------------

    def log(
        self, values: Mapping[str, float | Tensor] | None = None, /, **more: float | Tensor
    ) -> None:
        """Show values of this step: numbers, or tensors of one element, which are not read.

        `loss=` is shown as train/loss; a name with a slash, in the mapping, as it stands. Several
        logs in one step are averaged, and so are the steps of an interval.

        A loop may log before or after `optimizer.step()`: whether the first log of a name comes
        before the first step decides to which step all of that name belong. What begins with
        eval/, val/, valid/, validation/, dev/ or test/ is of the parameters as they are: the mean
        over what is logged between two steps is shown at the first of them.

        Raises:
            ValueError: a tensor or an array of more than one element.
            TypeError: something that is no real number.
        """
        if self._measuring:
            self._outside(self._log, {**(values or {}), **more})

    def log_metrics(self, metrics: CrossEntropyMetrics) -> None:
        """Show the loss metrics of one micro-batch: the interval's means over its tokens."""
        if self._measuring:
            self._outside(self._log_metrics, metrics)

    def micro_batch(
        self,
        loss: float | Tensor | None = None,
        *,
        size: Tensor | int | None = None,
        sample_ids: object = None,
    ) -> None:
        """Say, after its backward, that a micro-batch of the step is done.

        The norm of the gradients so far, which the gradient noise scale is estimated from, takes
        one more read of them for all micro-batches but the last. Under a GradScaler those are
        still scaled, and the last is not.

        Arguments:
            loss: of this micro-batch, [].
            size: its examples, or whatever its loss is a mean over; a tensor is not read.
            sample_ids: what the loader calls its examples; shown where something is wrong.
        """
        if self._measuring:
            loss = None if loss is None else scalar("loss", loss, "Watch.micro_batch")
            size = None if size is None else count("size", size, "Watch.micro_batch")
            self._outside(self._log_micro_batch, loss, size, sample_ids)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent within, on an evaluation or a checkpoint, out of all rates."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._overhead.pause(time.perf_counter() - begin)

    def publish(self) -> None:
        """Publish the steps since the last publication now; with a step under way, at its end."""
        if self._measuring:
            self._guarded(self._observer.finish)
            self._guarded(self._recorder.publish)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what has been published is on disk; False after `timeout` seconds."""
        return self.publisher.flush(timeout)

    def close(self) -> None:
        """Publish the rest, write it and end; the optimizers have no hooks of ours then."""
        if not self._open:
            return
        if self._measuring:
            self._guarded(self._observer.finish)
            if not self._recorder.ready:  # or the last interval's histograms would be lost
                self.publisher.flush(_PATIENCE)
            self._guarded(lambda: self._recorder.publish(closing=True))
        self._detach()
        self._shutdown.close()
        self.publisher.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._shutdown.notify(f"exception: {kind.__name__}")
        self.close()

    # -- What the optimizer and the clipping say --------------------------------------------------

    def before_clipping(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor | None:
        """Called by `pyvizllm.clip_grad_norm_`."""
        if not self._measuring:
            return None
        norm: Tensor | None = self._outside(self._measure_before_clipping, parameters, max_norm)
        return norm

    def _log(self, values: Mapping[str, float | Tensor]) -> None:
        checked = {name: scalar(name, value, "Watch.log") for name, value in values.items()}
        with self._recording():
            self._guarded(lambda: self._record(checked))

    def _record(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            tag = name if "/" in name else f"train/{name}"
            if self._observer.stepped and self._recorder.logs_before(tag):
                self._observer.finish()  # it is of the next step
            self._recorder.log(tag, value, stepped=self._observer.stepped)

    def _log_metrics(self, metrics: CrossEntropyMetrics) -> None:
        with self._recording():
            self._guarded(
                lambda: self._recorder.log_metrics(metrics, stepped=self._observer.stepped)
            )

    def _log_micro_batch(
        self, loss: float | Tensor | None, size: Tensor | int | None, sample_ids: object
    ) -> None:
        with self._recording(device=True):
            self._guarded(lambda: self._add_micro_batch(loss, size, sample_ids))

    def _measure_before_clipping(
        self, parameters: Sequence[Tensor], max_norm: float
    ) -> Tensor | None:
        with self._recording(device=True):
            return self._guarded(lambda: self._observer.before_clipping(parameters, max_norm))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = _has_closure(args, kwargs)
        if self._measuring and not self._captured():
            with self._recording(device=True):
                self._guarded(lambda: self._observer.before_step(optimizer, closure=closure))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = _has_closure(args, kwargs)
        if self._measuring and not self._captured():
            with self._recording(device=True):
                self._guarded(lambda: self._observer.after_step(optimizer, closure=closure))

    @contextlib.contextmanager
    def _recording(self, *, device: bool = False) -> Iterator[None]:
        """Around all that makes tensors: they are ordinary ones, also under inference_mode."""
        self._thread = threading.get_ident()
        try:
            # no_grad last: to leave inference mode is to turn gradients on.
            ordinary = torch.inference_mode(False), torch.no_grad()
            with self._overhead.of_step(device=device), ordinary[0], ordinary[1]:
                yield
        finally:
            self._thread = None
            self._shutdown.resume()

    def _captured(self) -> bool:
        """Whether this is a recording for a CUDA graph, whose replays call no hooks."""
        return self._overhead.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _add_micro_batch(
        self, loss: float | Tensor | None, size: Tensor | int | None, sample_ids: object
    ) -> None:
        self._observer.finish()  # a backward is of the next step
        self._recorder.begin()
        spared = self._recorder.last_micro_batch_is_next or not self._observer.measures
        norms = [] if spared else squared_norms(self._recorder.blocks)
        if isinstance(loss, Tensor):
            loss = loss.detach().to(torch.float64, copy=True)
        if isinstance(size, Tensor):
            size = size.detach().clone()
        self._recorder.add_micro_batch(MicroBatch(loss, norms, size, sample_ids))

    def _on_shutdown(self, reason: str) -> None:
        """Publish what there is and dump the last steps: the process is about to end."""
        if self._measuring and not self._overhead.within:  # else a step's recording is half done
            self._guarded(self._observer.finish)
            self._guarded(lambda: self._recorder.publish(closing=True))
        diagnosing, step = self._diagnosing, self.step
        if diagnosing is not None:
            self.publisher.submit(lambda: diagnosing.dump(reason, step))

    def _guarded(self, action: Callable[[], Result]) -> Result | None:
        """Run our own code; if it raises, say so once and watch no more, but let training go on."""
        try:
            return action()
        except Exception as error:
            _logger.warning("watch: switched off, training goes on: %r", error, exc_info=True)
            # The hooks stay until `close`: they must not be removed while torch calls them.
            self._measuring = False
            return None

    def _detach(self) -> None:
        self._open = self._measuring = False
        observers.discard(self)
        for hook in self._hooks:
            hook.remove()
        atexit.unregister(self.close)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)


def _has_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(callable(argument) for argument in (*args, *kwargs.values()))


def _show_graph(board: TensorBoardSink, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        board.write_graph(model, inputs)
    except Exception as error:  # whatever the model's forward raises under a tracer
        _logger.warning("watch: the model's graph cannot be traced: %s", error)
