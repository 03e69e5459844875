"""`watch`: telemetry in anybody's training loop."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyvizllm.telemetry.assembler import MAX_TAGS
from pyvizllm.telemetry.engine import Engine
from pyvizllm.telemetry.folder import run_folder
from pyvizllm.telemetry.names import Patterns, WatchedNames
from pyvizllm.telemetry.opening import open_watch
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.records import KINDS, Kind
from pyvizllm.telemetry.sinks import Sink
from pyvizllm.telemetry.terminal import TerminalSink
from pyvizllm.telemetry.watch_arguments import (
    check,
    ignored_rules,
    json_block,
    kinds,
    optimizers_of,
)
from pyvizllm.telemetry.watch_handle import Watch


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    logdir: str | os.PathLike[str] | None = None,
    *,
    every: int = 50,
    include: Patterns = None,
    exclude: Patterns = None,
    histograms: Kind | Sequence[Kind] = KINDS,
    max_overhead: float | None = None,
    max_tags: int = MAX_TAGS,
    start_step: int = 0,
    hparams: Mapping[str, bool | float | str] | None = None,
    config: Mapping[str, Any] | None = None,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    ignore: str | Collection[str] | None = None,
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

    A step that a GradScaler skips is one where something tells of it: the optimizer, if it takes
    the scale itself, as fused ones and `pyvizllm.AdamW` do, or `pyvizllm.clip_grad_norm_`, to
    gradients that zero_grad has set to None. Of others torch calls no hook: they are not counted,
    and what is logged in them is averaged into the step beside them.

    Of several ranks each shows the gradients that its optimizer gets, which
    DistributedDataParallel has averaged, and its own losses; no training waits for another rank.

    Of sharded parameters (DTensors, as of fully_shard or tensor parallelism) the first rank that
    has a part shows the numbers of the whole; the folders of the others leave them out. The ranks'
    publishing threads send them through torch.distributed's store, without collectives: all ranks
    have to call `watch`, with the same `every`, after the sharding. Where parts do not come within
    half a minute, or never will, those parameters are left out of those steps, with one warning.
    `max_overhead` has no effect then. There is no gradient noise scale, and gradients that are
    Partial are left out. Parameters of FullyShardedDataParallel, the older kind of sharding, are
    left out, with a warning.

    Arguments:
        model: the model that is trained; it may be compiled or wrapped.
        optimizer: the optimizer, or all that train the model; None for all that step parameters
            of the model, whenever they are made.
        logdir: folder of the run, for TensorBoard. None: a new one in `runs`. Of several ranks
            that are given the same, all but rank 0 write into `logdir/rank1`, `rank2`, ...: runs
            of their own, which `pyvizllm doctor` and `report` read as such.
        every: optimizer steps between two publications, each of which covers all steps since the
            one before.
        include, exclude: regular expressions that are searched in the parameters' names.
        histograms: which of "grad", "param" and "update" get histograms.
        max_overhead: share of the time, such as 0.01, that telemetry may take; it publishes and
            measures less often until that holds. None: as often as asked.
        max_tags: the most tags for TensorBoard; beyond it layers stand for parameters.
        start_step: the last step done before, for a training that goes on; TensorBoard then
            forgets the later steps of the same folder.
        hparams: the run's settings, for TensorBoard's table of runs.
        config: whatever JSON can hold, shown as text.
        example_inputs: arguments of a call of the model, to trace its graph with and show it; a
            model that cannot be traced is told in a warning.
        ignore: names of rules of the diagnosis that do not fit this training, or a single one:
            "loss_spike", "divergence" and "learning_rate_too_high" where a loss that rises is no
            fault, as of two networks against each other, of a policy's returns, of data that
            becomes harder. `pyvizllm doctor --rules` lists them.
        terminal: whether to print a line for each publication, and what is found to be wrong.
            Without, what is serious is logged as a warning.
        sinks: where to publish beside the TensorBoard and JSON files of `logdir`.

    Returns:
        A `Watch`: `log` adds scalars to a step, `close` (or a `with` block) ends it, and `logdir`
        is the run's folder, which its repr shows.

    Raises:
        TypeError, ValueError: a sentence about the argument that is wrong.
        OSError: `logdir` cannot be written. Nothing is left behind then; `sinks` are closed.

    Example:
        >>> with pyvizllm.watch(model, optimizer) as w:
        ...     for batch in loader:
        ...         loss = model(batch)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         w.log(loss=loss)
    """
    check(model, logdir, every, max_overhead, max_tags, start_step, hparams, sinks)
    histograms = kinds(histograms)
    optimizers = None if optimizer is None else optimizers_of(model, optimizer)
    names = WatchedNames(model, include, exclude)
    texts = {} if config is None else {"config": json_block(config)}
    folder = run_folder(logdir)
    sinks = [*([TerminalSink()] if terminal else []), *sinks]
    engine = Engine(
        names,
        folder,
        histograms=histograms,
        max_tags=max_tags,
        ignore=ignored_rules(ignore, "watch"),
        shown=any(isinstance(sink, TerminalSink) and sink.is_live for sink in sinks),
    )
    # Of what is trained: parameters that another process has are left on the meta device.
    devices = (p.device for p in model.parameters() if not p.is_meta)
    device = next(devices, torch.device("cpu"))
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    return open_watch(
        names,
        optimizers,
        engine,
        Overhead(int(every), max_overhead, device),
        folder,
        histograms=histograms,
        start_step=int(start_step),
        hparams=hparams,
        texts=texts,
        graph=None if example_inputs is None else (model, tuple(example_inputs)),
        sinks=sinks,
    )
