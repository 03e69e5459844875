"""`train`: the training loop, from top to bottom.

Nothing in a step reads a device value on the host: what is shown is summed on the device, and
read by the publisher's thread.
"""

import contextlib
import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyvizllm.ops import CrossEntropyMetrics, clip_grad_norm_
from pyvizllm.telemetry import Finding, HistorySink, Sink, Watch
from pyvizllm.telemetry.engine import Engine
from pyvizllm.telemetry.folder import rank_folder, remove_empty
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.opening import open_watch
from pyvizllm.telemetry.overhead import Overhead
from pyvizllm.telemetry.records import KINDS
from pyvizllm.telemetry.terminal import printable
from pyvizllm.telemetry.watch_arguments import hooked, ignored_rules, json_block
from pyvizllm.training.checkpoint import save_checkpoint
from pyvizllm.training.config import TrainConfig, build_config
from pyvizllm.training.data import Window
from pyvizllm.training.distributed import expected_to_be_called, joined
from pyvizllm.training.evaluation import evaluate
from pyvizllm.training.hparams import hparams_of
from pyvizllm.training.objective import LossFunction, to_device
from pyvizllm.training.preparation import Run, prepare
from pyvizllm.training.progress import ProgressBar
from pyvizllm.training.random_numbers import random_state
from pyvizllm.training.run_folder import choose_run_folder, delete_run, make_run_folder

__all__ = ["TrainResult", "train"]

_logger = logging.getLogger("pyvizllm")


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves behind."""

    metrics: dict[str, float]
    """The last value of every scalar: train/loss, train/accuracy, eval/loss, ..."""
    history: list[dict[str, float]]
    """One dict per publication of this call: "step" and the scalars by their tags."""
    run_dir: Path
    """The run's folder: events, history.jsonl, config.json, checkpoints."""
    checkpoint: Path | None
    """The last checkpoint, or None where none was written."""
    findings: list[Finding] = dataclasses.field(default_factory=list)
    """What the diagnosis has found in this call, in its order."""

    def __repr__(self) -> str:
        """One line: a notebook shows it, and the metrics are hundreds."""
        shown = ["" if not self.history else f"step {self.history[-1]['step']:.0f}"]
        for tag, name in (("train/loss", "loss"), ("eval/loss", "eval loss")):
            if tag in self.metrics:
                shown.append(f"{name} {self.metrics[tag]:.4f}")
        shown.append(f"{len(self.findings)} finding{'' if len(self.findings) == 1 else 's'}")
        shown.append(f"run_dir {str(self.run_dir)!r}")
        return f"<TrainResult: {', '.join(filter(None, shown))}>"


def train(
    model: nn.Module,
    train_data: Any,
    eval_data: Any = None,
    *,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
    lr_scheduler: LRScheduler | None = None,
    config: TrainConfig | None = None,
    **options: Any,
) -> TrainResult:
    """Train `model`, show every step's loss and gradients live, and keep checkpoints.

    Arguments:
        model: any module. Without a `loss_fn` it maps the inputs of a batch (inputs, targets) to
            logits: [..., C] for targets [...] of class indices, or torch's [N, C, ...] for
            [N, ...]. It is moved to the training's device.
        train_data: a map-style dataset of examples (shuffled anew each epoch, from the seed), or a
            DataLoader or any iterable of batches in its own order. A list is a list of batches.
        eval_data: the same, in order; evaluated every `eval_steps` and at the end.
        loss_fn: called as loss_fn(model, batch) for batches of any form; returns the mean loss of
            the batch, a scalar tensor, or (loss, CrossEntropyMetrics).
        optimizer: any torch optimizer over the model's parameters, instead of `optim`. Its own
            learning rates are the schedule's highest.
        lr_scheduler: a torch scheduler over `optimizer`, stepped once per optimizer step.
        config: a TrainConfig; `options` are its fields by name and go before it.

    Several processes, as torchrun starts them, train together: each has a copy of the model (by
    torch's DistributedDataParallel, which `loss_fn` is given; a model that is wrapped already stays
    as it is) and takes `gradient_accumulation_steps` micro-batches of each step. Losses, metrics
    and evaluations are those of all. All read the same data, each its share; a DataLoader with a
    DistributedSampler brings each what is its own. Rank 0 writes the checkpoints, and the others
    their telemetry into `rank1`, `rank2`, ... of the run's folder. A model with parameters that a
    step leaves unused has to be wrapped by the caller, with find_unused_parameters=True.

    A step is one optimizer step: `gradient_accumulation_steps` micro-batches whose every counted
    target weighs the same. Gradients that are not finite are shown (health/*, the norm) and warned
    of once; the step is taken, as in torch. The random numbers of python, numpy and torch are
    seeded, in the whole process.

    Returns:
        TrainResult: final metrics, history, findings, run folder and last checkpoint.

    Raises:
        TypeError, ValueError: a sentence about what was expected and what came; no file has been
            written then, save when a later batch is the first that is wrong.

    Example:
        result = pyvizllm.train(model, dataset, max_steps=1000, learning_rate=3e-4, bf16=True)
        print(result.metrics["train/loss"], result.run_dir)
    """
    config = build_config(config, options)
    run = prepare(model, train_data, eval_data, loss_fn, optimizer, lr_scheduler, config, joined())
    return _watched(run, lr_scheduler)


def _watched(run: Run, lr_scheduler: LRScheduler | None) -> TrainResult:
    """The training, seen from outside; `lr_scheduler` is the caller's."""
    config, begun = run.config, run.step
    run_dir, in_place = _choose_run_folder(run)
    names = WatchedNames(run.model, config.include or None, config.exclude, operation="train")
    histograms = KINDS if config.histograms else ()
    engine = Engine(
        names,
        run_dir,
        histograms=histograms,
        max_tags=config.max_tags,
        ignore=ignored_rules(config.ignore, "train"),
        shown=run.processes.rank > 0 or (not config.disable_tqdm and sys.stderr is not None),
    )
    if run.processes.rank == 0:
        make_run_folder(config, run_dir, in_place)
    run.processes.wait_for_first()
    if run.processes.rank > 0:  # within the folder of rank 0, which had to be new
        make_run_folder(config, run_dir, in_place=True)

    history = HistorySink()
    quiet = config.disable_tqdm or run.processes.rank > 0
    bar = None if quiet else _progress_bar(run, run_dir)
    sinks: list[Sink] = [history] if bar is None else [history, bar]
    try:
        watch = open_watch(
            names,
            [hooked(run.optimizer)],
            engine,
            Overhead(config.logging_steps, config.max_overhead, run.device),
            run_dir,
            histograms=histograms,
            statistics=config.telemetry,
            start_step=run.step,
            hparams=hparams_of(run, lr_scheduler),
            texts={"config": json_block(dataclasses.asdict(config))},
            sinks=sinks,
        )
        checkpoint = _train(run, run_dir, watch, bar)
    except Exception:
        if run.step == begun and not in_place:  # model and data do not fit: leave no run behind
            delete_run(run_dir)
            if run.processes.rank > 0:  # nor the folder that it is in, whoever comes last
                remove_empty([run_dir.parent])
        raise

    metrics = {tag: value for entry in history.history for tag, value in entry.items()}
    metrics.pop("step", None)
    return TrainResult(metrics, history.history, run_dir, checkpoint, history.findings)


def _choose_run_folder(run: Run) -> tuple[Path, bool]:
    """(this process's folder, whether the run goes on there)."""
    folder, in_place = run.processes.of_first(choose_run_folder(run.config, run.checkpoint))
    rank = run.processes.rank
    return folder if rank == 0 else rank_folder(folder, rank), in_place


def _progress_bar(run: Run, run_dir: Path) -> ProgressBar:
    """The bar, over a line that says where the run is: to look at while it lasts."""
    bar = ProgressBar(run.step, run.total_steps)
    if bar.terminal is not None:
        bar.bar.write(f"train: the run is in {printable(str(run_dir))}", file=bar.terminal)
    return bar


def _train(run: Run, run_dir: Path, watch: Watch, bar: ProgressBar | None) -> Path | None:
    """The loop. Returns the last checkpoint."""
    config, step = run.config, run.step
    checkpoint, evaluated, window = run.checkpoint, -1, None
    # Left by an exception, it publishes the steps of the interval, and dumps the last of them.
    with watch:
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        # An optimizer may also train what is not in the model: a temperature, the loss's weights.
        optimized = [p for group in run.optimizer.param_groups for p in group["params"]]
        cleared = list(dict.fromkeys([*parameters, *optimized]))
        run.model.train()
        run.model.zero_grad(set_to_none=True)
        run.optimizer.zero_grad(set_to_none=True)
        check: AbstractContextManager[None] = expected_to_be_called(run.replica)
        for step, window in zip(_steps(run), run.windows):  # noqa: B905 - the steps end first
            with check:
                _backward(run, window, watch)
            check = contextlib.nullcontext()
            _clip(config, parameters, watch)
            run.optimizer.step()
            run.scheduler.step()
            for parameter in cleared:  # zero_grad would walk through all modules each step
                parameter.grad = None
            run.step = step
            if bar is not None:
                bar.advance()
            if config.eval_steps and step % config.eval_steps == 0:
                with watch.paused():
                    evaluated = _evaluate(run, watch, step)
            if config.save_steps and step % config.save_steps == 0:
                # What came before a checkpoint is published with it: a resumed run knows nothing
                # of an interval that began earlier, and must show the same values as this one.
                watch.publish()
                with watch.paused():
                    checkpoint = _save(run, run_dir, step, window)
        if run.total_steps is not None and step < run.total_steps:
            _logger.warning("train: the data ended after step %d of %d", step, run.total_steps)
        watch.publish()
        if evaluated != step:
            _evaluate(run, watch, step)
    saved = checkpoint is not None and checkpoint.name == f"step-{step}"
    if window is not None and config.save_steps != 0 and not saved:
        checkpoint = _save(run, run_dir, step, window)
    return checkpoint


def _steps(run: Run) -> Iterable[int]:
    if run.total_steps is None:
        return itertools.count(run.step + 1)
    return range(run.step + 1, run.total_steps + 1)


def _backward(run: Run, window: Window, watch: Watch) -> None:
    """Accumulate the gradients of a window: (sum of all losses) / (number of all targets).

    Of several processes each has its share of both sums. Its last backward averages the gradients
    of all, who therefore have one each.
    """
    counts = [run.objective.count(batch) * (not window.borrowed) for batch in window.batches]
    count = torch.stack(counts).sum()
    if run.processes.size > 1:
        count = run.processes.sum_of(count.to(run.device, non_blocking=True))
    run.tokens_seen = run.tokens_seen + count
    # A window without one counted target has gradients of 0, where 0 / 0 would ruin the model.
    divisor = count.clamp(min=1)
    losses: list[Tensor] = []  # shares of the mean, of micro-batches without metrics
    metrics: list[CrossEntropyMetrics] = []
    for number, batch in enumerate(window.batches, 1):
        own_count, ids = counts[number - 1], window.sample_ids[number - 1]
        with _alone(run.replica) if number < len(counts) else contextlib.nullcontext():
            with run.autocast():
                loss, measured = run.objective(run.replica, to_device(batch, run.device), own_count)
            if not loss.requires_grad:
                raise ValueError(
                    "train: expected a loss that depends on the model's trainable parameters, got "
                    "one without a gradient (detached, or computed under no_grad)"
                )
            loss = loss * 0 if window.borrowed else loss
            (loss / divisor * run.processes.size).backward()
        loss, own_count = loss.detach(), own_count.to(loss.device, non_blocking=True)
        if not window.borrowed:
            # Of two micro-batches the second's gradients are those of all processes by now.
            sized = run.processes.size == 1 or len(counts) > 2
            watch.micro_batch(loss / own_count, size=own_count if sized else None, sample_ids=ids)
        if measured is None:
            # The mean over no target is NaN: it must not hide the losses of the others.
            losses.append(torch.where(own_count > 0, loss / divisor, 0.0))
        elif window.borrowed:
            metrics.append(CrossEntropyMetrics(torch.zeros_like(measured.sums)))
        else:
            metrics.append(measured)
    _log(run, watch, losses, metrics, count)


def _alone(replica: nn.Module) -> AbstractContextManager[Any]:
    """For a backward that keeps its gradients for the next."""
    if isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return contextlib.nullcontext()


def _log(
    run: Run,
    watch: Watch,
    losses: list[Tensor],
    metrics: list[CrossEntropyMetrics],
    count: Tensor,
) -> None:
    """Show what a step's losses were, in all processes together."""
    loss = sum(losses[1:], losses[0]) if losses else None
    measured = sum(metrics[1:], metrics[0]) if metrics else None
    if run.processes.size > 1:
        sums = torch.zeros(1 + CrossEntropyMetrics.SIZE, dtype=torch.float64, device=run.device)
        if loss is not None:
            sums[0] = loss
        if measured is not None:
            sums[1:] = measured.sums
        run.processes.sum_of(sums)
        loss = None if loss is None else sums[0]
        measured = None if measured is None else CrossEntropyMetrics(sums[1:])
    if measured is not None:
        watch.log_metrics(measured)
    if loss is not None:
        watch.log(loss=loss / (count > 0))  # NaN where nothing in the window counted


def _clip(config: TrainConfig, parameters: list[nn.Parameter], watch: Watch) -> None:
    """Clip the gradients' norm; with telemetry, the one read that measures them gives the norm."""
    if config.max_grad_norm == 0:
        return
    try:
        norm = clip_grad_norm_(parameters, config.max_grad_norm)
    except NotImplementedError as error:
        raise TypeError(
            "train: expected dense gradients to clip, got sparse ones (max_grad_norm=0 does "
            "not clip; torch.nn.Embedding: use sparse=False)"
        ) from error
    if not config.telemetry:
        watch.log(grad_norm=norm)


def _evaluate(run: Run, watch: Watch, step: int) -> int:
    """Evaluate, where there is data for it; returns `step`, the step that has been evaluated."""
    if run.eval_source is not None:
        watch.log_evaluation(evaluate(run, run.eval_source, step))
    return step


def _save(run: Run, run_dir: Path, step: int, window: Window) -> Path:
    """The checkpoint that rank 0 writes, and that all know when it is there."""
    own, *others = run.processes.all_of(random_state())
    run.processes.share_buffers(run.model)
    if run.processes.rank > 0:
        return run.processes.of_first(run_dir)
    position = {
        "epoch": window.epoch,
        "consumed": window.consumed,
        "epoch_state": window.epoch_state,
    }
    training = {
        "step": step,
        "epoch": window.epoch,
        "tokens_seen": int(run.tokens_seen),  # sync point: a checkpoint reads the device anyway
        "position": position,
        "data": run.train_source.identity,
        "random_state": own,
        "other_random_states": others,
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.scheduler.state_dict(),
    }
    checkpoint = save_checkpoint(
        run_dir,
        step,
        model=run.model.state_dict(),
        training=training,
        config=dataclasses.asdict(run.config),
        keep=run.config.save_total_limit,
    )
    return run.processes.of_first(checkpoint)
