"""Everything that is decided and checked before a run writes its first file."""

import contextlib
import dataclasses
import inspect
import itertools
import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyvizllm.telemetry.watch_arguments import check_model
from pyvizllm.training.checkpoint import check_plain, find_checkpoint, load_checkpoint
from pyvizllm.training.config import TrainConfig
from pyvizllm.training.data import Source, Window, make_source, windows
from pyvizllm.training.distributed import Processes, unwrapped
from pyvizllm.training.objective import (
    CrossEntropyObjective,
    LossFunction,
    Objective,
    UserObjective,
)
from pyvizllm.training.random_numbers import restore_random_state, seed_everything
from pyvizllm.training.schedule import follow_schedule, make_optimizer, make_schedule

__all__ = ["Run", "prepare"]

_logger = logging.getLogger("pyvizllm")

_OPTIMIZER_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "momentum",
)
_SAVED = frozenset(
    ("step", "tokens_seen", "position", "data", "random_state", "optimizer", "lr_scheduler")
)  # what a checkpoint's training.pt is asked for


@dataclass
class Run:
    """A checked training, ready to start."""

    config: TrainConfig
    processes: Processes
    model: nn.Module
    replica: nn.Module  # what is called in training: the model, or what averages its gradients
    objective: Objective
    device: torch.device
    optimizer: Optimizer
    scheduler: LRScheduler
    train_source: Source
    eval_source: Source | None
    total_steps: int | None  # None: until the data ends
    windows: Iterator[Window] = field(default_factory=lambda: iter(()))
    step: int = 0  # the last one that is done
    tokens_seen: Tensor | int = 0  # [] int64 once a step is done
    checkpoint: Path | None = None  # the one it was resumed from

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast if the configuration says so; else whatever the caller has set up."""
        if self.config.bf16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def prepare(
    model: nn.Module,
    train_data: Any,
    eval_data: Any,
    loss_fn: LossFunction | None,
    optimizer: Optimizer | None,
    lr_scheduler: LRScheduler | None,
    config: TrainConfig,
    processes: Processes,
) -> Run:
    """Check and build all parts, take up the checkpoint if there is one, read the first window.

    Raises:
        ValueError, TypeError: sentences about what was expected; nothing has been written.
    """
    _check_arguments(model, loss_fn, optimizer, lr_scheduler)
    given, model = model, unwrapped(model)
    if optimizer is not None:
        _check_optimizer(model, optimizer)
    device = processes.device(_choose_device(model, config))
    pin = device.type == "cuda"
    train_source = make_source(
        train_data,
        processes,
        batch_size=config.per_device_train_batch_size,
        seed=config.seed,
        shuffle=True,
        workers=config.dataloader_num_workers,
        pin_memory=pin,
    )
    eval_source = (
        None if eval_data is None else _make_eval_source(eval_data, config, processes, pin)
    )
    total_steps, epochs = _duration(config, train_source)
    saved = _find(config, train_source)
    if saved is not None and optimizer is None:
        _warn_of_other_settings(config, saved[0])

    if len({p.device for p in model.parameters()}) == 1:  # a model spread over devices stays so
        model.to(device)
    optimizer = make_optimizer(config, model) if optimizer is None else optimizer
    scheduler = lr_scheduler or make_schedule(config, optimizer, total_steps)
    run = Run(
        config=config,
        processes=processes,
        model=model,
        replica=given,
        objective=UserObjective(loss_fn, config) if loss_fn else CrossEntropyObjective(config),
        device=device,
        optimizer=optimizer,
        scheduler=scheduler,
        train_source=train_source,
        eval_source=eval_source,
        total_steps=total_steps,
    )
    if config.save_steps != 0:
        check_plain("model", model.state_dict())
        check_plain("optimizer", optimizer.state_dict())
        check_plain("lr_scheduler", scheduler.state_dict())
    seed_everything(config.seed)
    position = None if saved is None else _restore(run, *saved)
    accumulated = config.gradient_accumulation_steps
    stream = windows(train_source, accumulated, processes, epochs=epochs, resume=position)
    run.windows = _peek(run, stream)
    if given is model:
        run.replica = processes.replica(model)
    return run


def _check_arguments(
    model: nn.Module, loss_fn: object, optimizer: object, lr_scheduler: object
) -> None:
    check_model(model, "train")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("train: expected a model with trainable parameters, got none")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"train: expected loss_fn(model, batch), got {type(loss_fn).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            "train: expected optimizer to be a torch.optim.Optimizer (optim='adamw' or 'sgd' "
            f"names one), got {type(optimizer).__name__}"
        )
    if lr_scheduler is None:
        return
    if not isinstance(lr_scheduler, LRScheduler) or isinstance(
        lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
    ):
        raise TypeError(
            "train: expected lr_scheduler to be a torch scheduler whose step() takes no metric, "
            f"got {type(lr_scheduler).__name__}"
        )
    if lr_scheduler.optimizer is not optimizer:
        raise ValueError("train: expected lr_scheduler to be over the optimizer passed with it")


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            "train: expected an optimizer whose step() takes no closure, got "
            f"{type(optimizer).__name__}, which wants to compute the loss several times a step"
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in trained for p in model.parameters()):
        raise ValueError(
            "train: expected an optimizer over the model's parameters, got "
            f"{type(optimizer).__name__} over none of them"
        )


def _make_eval_source(
    data: Any, config: TrainConfig, processes: Processes, pin_memory: bool
) -> Source:
    if isinstance(data, Iterator):
        raise ValueError(
            "train: expected eval_data that can be read more than once, "
            f"got {type(data).__name__}, which ends after the first time"
        )
    return make_source(
        data,
        processes,
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
        shuffle=False,
        workers=config.dataloader_num_workers,
        pin_memory=pin_memory,
    )


def _choose_device(model: nn.Module, config: TrainConfig) -> torch.device:
    if config.device is not None:
        return torch.device(config.device)
    own = next(model.parameters()).device
    return torch.device("cuda") if own.type == "cpu" and torch.cuda.is_available() else own


def _duration(config: TrainConfig, source: Source) -> tuple[int | None, float]:
    """(optimizer steps in all, epochs at most), either of which may be the one that decides."""
    if config.max_steps != -1:
        return config.max_steps, float("inf")
    if source.length is None:
        return None, math.ceil(config.num_train_epochs)
    of_a_step = config.gradient_accumulation_steps * source.processes.size
    steps_per_epoch = -(-source.length // of_a_step)
    return math.ceil(config.num_train_epochs * steps_per_epoch), float("inf")


def _find(
    config: TrainConfig, source: Source
) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    if config.resume_from_checkpoint in (None, False):
        return None
    path = find_checkpoint(
        config.resume_from_checkpoint or False, config.output_dir, config.run_name
    )
    model, training, _ = load_checkpoint(path)
    if not isinstance(model, dict) or not isinstance(training, dict):
        raise ValueError(f"train: expected a checkpoint written by train, got '{path}'")
    missing = sorted(_SAVED - training.keys())
    if missing:
        raise ValueError(
            f"train: expected a checkpoint written by train, got '{path}', which has no "
            f"{', '.join(missing)}"
        )
    for name, value in training["data"].items():
        if source.identity.get(name) != value:
            raise ValueError(
                f"train: expected the same data as in the checkpoint '{path}' "
                f"({name} {value}), got {name} {source.identity.get(name)}"
            )
    return path, model, training


def _warn_of_other_settings(config: TrainConfig, path: Path) -> None:
    """The optimizer's settings are part of its state: those of the checkpoint go on."""
    before = json.loads((path / "config.json").read_text())
    now = dataclasses.asdict(config)
    changed = [name for name in _OPTIMIZER_SETTINGS if before.get(name, now[name]) != now[name]]
    if changed:
        _logger.warning(
            "train: the optimizer goes on with the checkpoint's settings: %s",
            ", ".join(f"{name} {before[name]} (not {now[name]})" for name in changed),
        )


def _restore(
    run: Run, path: Path, model: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    """Bring `run` to the state of a checkpoint; returns the position in the data."""
    try:
        run.model.load_state_dict(model)
        run.optimizer.load_state_dict(training["optimizer"])
        run.scheduler.load_state_dict(training["lr_scheduler"])
        follow_schedule(run.scheduler)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"train: expected the model and optimizer of the checkpoint '{path}', got: {error}"
        ) from error
    # load_state_dict takes the groups of any optimizer, and the first step finds no momentum.
    for group in run.optimizer.param_groups:
        missing = sorted(run.optimizer.defaults.keys() - group.keys())
        if missing:
            raise ValueError(
                f"train: expected the optimizer of the checkpoint '{path}', got "
                f"{type(run.optimizer).__name__}, of which it has no {', '.join(missing)}"
            )
    run.step = training["step"]
    run.tokens_seen = training["tokens_seen"]
    run.checkpoint = path
    states = [training["random_state"], *training.get("other_random_states", ())]
    # Of more processes than there were, the others draw what rank 0 draws.
    restore_random_state(states[run.processes.rank if run.processes.rank < len(states) else 0])
    position: dict[str, Any] = training["position"]
    return position


def _peek(run: Run, stream: Iterator[Window]) -> Iterator[Window]:
    """`stream` with its first window read and counted, so that unusable data is found early."""
    if run.total_steps is not None and run.step >= run.total_steps:
        return iter(())
    first = next(stream, None)
    if first is None:
        if run.step > 0:
            return iter(())
        raise ValueError("train: expected data with at least one batch, got none")
    for batch in first.batches:
        run.objective.count(batch)
    return itertools.chain([first], stream)
