"""`Watch`: what a watched training loop says, and what its optimizers' hooks tell."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.ops import CrossEntropyMetrics
from pyvizllm.ops.clip_grad_norm import observers
from pyvizllm.telemetry.diagnosing import Diagnosing
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.observer import StepObserver
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.publisher import Publisher
from pyvizllm.telemetry.publishing import Assembling
from pyvizllm.telemetry.recorder import Recorder, squared_norms
from pyvizllm.telemetry.records import KINDS, Kind, Publication
from pyvizllm.telemetry.shutdown import Shutdown
from pyvizllm.telemetry.step_buffer import MicroBatch
from pyvizllm.telemetry.step_hooks import hooks_follow, hooks_of
from pyvizllm.telemetry.watch_arguments import (
    count,
    loss_metrics,
    named_values,
    plain_ids,
    scalar,
)

_PATIENCE = 10.0  # seconds that the end gives a slow disk before it gives up its last histograms
_logger = logging.getLogger("pyvizllm")
Result = TypeVar("Result")


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
            names,
            optimizers,
            histograms if statistics else (),
            statistics,
        )
        self._measuring = self._open = True
        self._diagnosing = diagnosing
        self._given = optimizers is not None
        self._pid = os.getpid()  # a forked child, for whom nobody publishes, records nothing
        self._lock = threading.RLock()  # a thread may log while another one trains
        self._thread: int | None = None  # that holds it
        self._stepper: int | None = None  # the thread that has stepped last
        # A compiled step calls what is ours as it is: outside of its graph.
        self._outside: Callable[..., Any] = torch.compiler.disable(_call)
        atexit.register(self.close)
        # After the line above, so that at an exit by an exception the dump comes first.
        self._shutdown = Shutdown(
            publisher,
            [self._on_shutdown],
            busy=lambda: self._thread == threading.get_ident(),
            trains=lambda: self._stepper == threading.get_ident(),
        )
        # Last: another thread may be stepping.
        self._hooks = hooks_of(optimizers)
        for hooks in self._hooks:
            hooks.listeners[self] = None
        observers[self] = None

    def __repr__(self) -> str:
        state = "" if self._open else ", closed"
        folder = None if self.logdir is None else str(self.logdir)
        return f"<Watch: step {self.step}{state}, logdir {folder!r}>"

    @property
    def step(self) -> int:
        """The number of optimizer steps done, `start_step` included."""
        return self._recorder.step + self._observer.stepped

    # -- What the loop may say --------------------------------------------------------------------

    def log(
        self, values: Mapping[str, float | Tensor] | None = None, /, **more: float | Tensor
    ) -> None:
        """Show values of this step: numbers, or tensors of one element, which are not read.

        Any thread may log; one that does not train logs to the step under way.

        `loss=` is shown as train/loss; a name with a slash, in the mapping, as it stands; one that
        is measured, too, as train/logged_grad_norm. Several logs in one step are averaged, and so
        are the steps of an interval.

        A loop may log before or after `optimizer.step()`: whether the first log of a name comes
        before the first step decides to which step all of that name belong. What begins with
        eval/, val/, valid/, validation/, dev/ or test/ is of the parameters as they are: the mean
        over what is logged between two steps is shown at the first of them.

        Raises:
            ValueError: a tensor or an array of more than one element.
            TypeError: something that is no real number, or has no name.
        """
        if self._measuring:
            self._outside(self._log, named_values(values, more))

    def log_metrics(self, metrics: CrossEntropyMetrics) -> None:
        """Show the loss metrics of one micro-batch: the interval's means over its tokens."""
        if self._measuring:
            self._outside(self._log_metrics, loss_metrics(metrics))

    def micro_batch(
        self,
        loss: float | Tensor | None = None,
        *,
        size: Tensor | int | None = None,
        sample_ids: object = None,
    ) -> None:
        """Say, after its backward, that a micro-batch of the step is done.

        The norm of the gradients so far, which the gradient noise scale is estimated from, takes
        one more read of them for all micro-batches but the last of three or more. Under a
        GradScaler those are still scaled, and the last is not.

        Arguments:
            loss: of this micro-batch, [].
            size: its examples, or whatever its loss is a mean over; a tensor is not read. Of all
                ranks together, where each backward averages over them. Where only the last one of
                a step does (DistributedDataParallel's no_sync), this rank's, and of three or more
                micro-batches: with two the noise scale is far too large.
            sample_ids: what the loader calls its examples; shown where something is wrong. They
                are copied.
        """
        if self._measuring:
            loss = None if loss is None else scalar("loss", loss, "Watch.micro_batch")
            size = None if size is None else count("size", size, "Watch.micro_batch")
            self._outside(self._log_micro_batch, loss, size, sample_ids)

    def log_evaluation(self, read: Callable[[], Publication]) -> None:
        """Show an evaluation of the parameters as they are; the publisher's thread reads it."""
        diagnosing = self._diagnosing
        look = (lambda publication: publication) if diagnosing is None else diagnosing.evaluated
        self.publisher.submit(lambda: look(read()))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent within, on an evaluation or a checkpoint, out of all rates."""
        with self._overhead.paused():
            yield

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
        self._publish_rest()
        if self._measuring:
            self._guarded(self._show_unfinished)
        self._detach()
        self.publisher.close()
        self._shutdown.close()  # after the last is on disk: until then SIGTERM has to wait for it

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, SystemExit):  # to leave is no failure
            self._shutdown.notify(f"exception: {kind.__name__}")
        self.close()

    # -- What the optimizer and the clipping say --------------------------------------------------

    def before_clipping(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor | None:
        """Called by `pyvizllm.clip_grad_norm_`."""
        if not self._measuring:
            return None
        norm: Tensor | None = self._outside(self._measure_before_clipping, parameters, max_norm)
        return norm

    def _log(self, values: Mapping[str, object]) -> None:
        checked = {name: scalar(name, value, "Watch.log") for name, value in values.items()}
        self._guarded(lambda: self._record(checked))

    def _record(self, values: Mapping[str, float | Tensor]) -> None:
        mine = self._stepper in (None, threading.get_ident())  # another thread ends no step
        for name, value in values.items():
            tag = name if "/" in name else f"train/{name}"
            if mine and self._observer.stepped and self._recorder.ends_step(tag):
                self._observer.finish()
            if self._observer.partly:
                self._recorder.logged_within(tag)
            self._recorder.log(tag, value, stepped=self._observer.stepped)

    def _log_metrics(self, metrics: CrossEntropyMetrics) -> None:
        self._guarded(lambda: self._recorder.log_metrics(metrics, stepped=self._observer.stepped))

    def _log_micro_batch(
        self, loss: float | Tensor | None, size: Tensor | int | None, sample_ids: object
    ) -> None:
        self._guarded(lambda: self._add_micro_batch(loss, size, sample_ids), device=True)

    def _measure_before_clipping(
        self, parameters: Sequence[Tensor], max_norm: float
    ) -> Tensor | None:
        return self._guarded(
            lambda: self._observer.before_clipping(parameters, max_norm), device=True
        )

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by an optimizer's hooks."""
        closure = _has_closure(args, kwargs)

        def observe() -> None:
            self._stepper = threading.get_ident()
            last = not hooks_follow(optimizer)
            self._observer.before_step(optimizer, closure=closure, last=last)

        if self._measuring and not self._captured():
            self._guarded(observe, device=True)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by an optimizer's hooks."""
        closure = _has_closure(args, kwargs)
        if self._measuring and not self._captured():
            self._guarded(
                lambda: self._observer.after_step(optimizer, closure=closure), device=True
            )

    def _captured(self) -> bool:
        """Whether this is a recording for a CUDA graph, whose replays call no hooks."""
        return self._overhead.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _add_micro_batch(
        self, loss: float | Tensor | None, size: Tensor | int | None, sample_ids: object
    ) -> None:
        self._observer.finish()  # a backward is of the next step
        self._recorder.begin()
        spared = self._recorder.last_micro_batch_is_next or not self._observer.measures
        spared |= any(block.in_parts for block in self._recorder.blocks)  # a part's norm is no norm
        norms = [] if spared else squared_norms(self._recorder.blocks)
        if isinstance(loss, Tensor):
            loss = loss.detach().to(torch.float64, copy=True).reshape(())
        if isinstance(size, Tensor):
            size = size.detach().to(torch.float64, copy=True).reshape(())
        try:
            ids = plain_ids(sample_ids)
        except Exception as error:  # whatever ids of the user's own raise
            ids = f"{type(sample_ids).__name__} that cannot be shown: {type(error).__name__}"
        self._recorder.add_micro_batch(MicroBatch(loss, norms, size, ids))

    def _on_shutdown(self, reason: str) -> None:
        """Publish what there is and dump the last steps: the process is about to end."""
        if not self._open:  # all is published, `close` writes it
            return
        if self._measuring and reason.startswith("exception"):  # after SIGTERM it may yet go on
            self._guarded(self._observer.finish)
            self._guarded(self._observer.break_off)
        self._publish_rest()
        diagnosing, step = self._diagnosing, self.step
        if diagnosing is not None:
            self.publisher.submit(lambda: diagnosing.dump(reason, step))

    def _show_unfinished(self) -> None:
        """What was logged of a step that never came is shown by itself, after all others."""
        if self._recorder.publish_unfinished() and not self._recorder.stepped:
            none = "no optimizer of the model's parameters has stepped"
            if self._given:  # a wrapper, such as SAM's, whose own step nobody calls
                none = "none of the given optimizers has stepped (without, those that do are found)"
            _logger.warning(
                "watch: %s; the mean of all that was logged is shown as step %d",
                none,
                self.step + 1,
            )

    def _publish_rest(self) -> None:
        if self._measuring:
            self._guarded(self._observer.finish)
            if not self._recorder.ready:  # or the last interval's histograms would be lost
                self.publisher.flush(_PATIENCE)
            self._guarded(lambda: self._recorder.publish(closing=True))

    def _guarded(self, action: Callable[[], Result], *, device: bool = False) -> Result | None:
        """Run our own code; if it raises, say so once and watch no more, but let training go on.

        One thread at a time. The tensors that it makes are ordinary ones, also in inference_mode.

        Arguments:
            action: what to do.
            device: whether the device has to do with it, whose time is counted then.
        """
        if os.getpid() != self._pid:  # before the lock: the fork may have copied it locked
            return None
        try:
            with self._lock:
                outer, self._thread = self._thread, threading.get_ident()
                try:
                    with self._overhead.of_step(device=device):
                        if not torch.is_inference_mode_enabled():
                            with torch.no_grad():
                                return action()
                        # no_grad last: to leave inference mode is to turn gradients on.
                        with torch.inference_mode(False), torch.no_grad():
                            return action()
                except Exception as error:
                    _logger.warning(
                        "watch: switched off, training goes on: %r", error, exc_info=True
                    )
                    # The hooks stay until `close`: they must not be removed while torch calls them.
                    self._measuring = False
                    return None
                finally:
                    self._thread = outer  # None, but where a hook of the user's called us again
        finally:
            # A signal's handler, which runs on the main thread, waits for the outermost.
            on_main_thread = threading.current_thread() is threading.main_thread()
            if on_main_thread and self._thread != threading.get_ident():
                self._shutdown.resume()

    def _detach(self) -> None:
        self._open = self._measuring = False
        observers.pop(self, None)
        for hooks in self._hooks:
            hooks.listeners.pop(self, None)
        atexit.unregister(self.close)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)


def _has_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(callable(argument) for argument in (*args, *kwargs.values()))
