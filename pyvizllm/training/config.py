"""The options of `pyvizllm.train`: one flat dataclass with Hugging Face's names."""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pyvizllm.telemetry.assembler import MAX_TAGS

__all__ = ["TrainConfig", "build_config"]


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a training run. Steps are optimizer steps."""

    output_dir: str = "runs"
    """Folder that holds the runs; a run is a folder inside it."""
    run_name: str | None = None
    """Name of the run's folder. None: a timestamp and a unique suffix."""
    overwrite_output_dir: bool = False
    """Replace an earlier run of the same name: its events, history and checkpoints are deleted."""
    resume_from_checkpoint: bool | str | None = None
    """Folder of a checkpoint or of a run to go on with; True: the latest checkpoint of this run
    name (or of output_dir, without a run name)."""

    max_steps: int = -1
    """Optimizer steps to train for. -1: num_train_epochs decides."""
    num_train_epochs: float = 1.0
    """Passes over the training data, where max_steps is -1."""
    per_device_train_batch_size: int = 8
    """Examples in a micro-batch (when the data is a dataset and not batches already)."""
    per_device_eval_batch_size: int = 8
    """Examples in a batch of the evaluation."""
    gradient_accumulation_steps: int = 1
    """Micro-batches whose gradients make one optimizer step; every token weighs the same."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches. 0: the training process does it."""

    optim: Literal["adamw", "sgd"] = "adamw"
    """Optimizer, where no optimizer object is given."""
    learning_rate: float = 3e-4
    """Highest learning rate of the schedule."""
    weight_decay: float = 0.0
    """Decay of parameters with two or more dimensions; biases and norms are never decayed."""
    adam_beta1: float = 0.9
    """AdamW: decay of the mean of the gradients."""
    adam_beta2: float = 0.999
    """AdamW: decay of the mean of the squared gradients."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the denominator."""
    momentum: float = 0.9
    """SGD: momentum."""
    max_grad_norm: float = 1.0
    """Clip the norm of all gradients together to this. 0: no clipping."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up; linear and cosine end near 0."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to learning_rate."""

    label_smoothing_factor: float = 0.0
    """Probability mass of the target that is spread over all classes, in [0, 1]."""
    z_loss: float = 0.0
    """Factor of the squared log-sum-exp that is added to the loss."""
    ignore_index: int = -100
    """Targets of this value do not count, in the loss or in any metric."""

    logging_steps: int = 10
    """Steps between two publications; each covers all steps since the one before."""
    eval_steps: int | None = None
    """Steps between two evaluations. None: only at the end."""
    save_steps: int | None = None
    """Steps between two checkpoints. None: only at the end; 0: none at all."""
    save_total_limit: int | None = None
    """Checkpoints to keep; older ones are deleted. None: all."""
    telemetry: bool = True
    """Watch every parameter, its gradients and its updates at every step."""
    histograms: bool = True
    """Publish their histograms (with telemetry)."""
    max_overhead: float | None = None
    """Share of the time that telemetry may take, such as 0.01: it then publishes and measures less
    often until that holds. None: as often as logging_steps says."""
    include: tuple[str, ...] = ()
    """Regular expressions: only parameters in whose names one is found are watched. (): all."""
    exclude: tuple[str, ...] = ()
    """Regular expressions: parameters in whose names one is found are not watched."""
    max_tags: int = MAX_TAGS
    """The most tags for TensorBoard; beyond it layers stand for parameters."""
    ignore: tuple[str, ...] = ()
    """Names of rules of the diagnosis that do not fit this training."""
    disable_tqdm: bool = False
    """Show no progress: neither a bar nor where the run is."""

    seed: int = 42
    """Seed of the data order and of python's, numpy's and torch's random numbers."""
    bf16: bool = False
    """Run forward and loss under bfloat16 autocast."""
    device: str | None = None
    """Device to train on, like "cpu" or "cuda:0". None: the model's, or CUDA where there is one."""


# Field -> (lowest value allowed, whether that value itself is allowed, highest value allowed).
_RANGES: dict[str, tuple[float, bool, float]] = {
    "num_train_epochs": (0, False, float("inf")),
    "per_device_train_batch_size": (1, True, float("inf")),
    "per_device_eval_batch_size": (1, True, float("inf")),
    "gradient_accumulation_steps": (1, True, float("inf")),
    "dataloader_num_workers": (0, True, float("inf")),
    "learning_rate": (0, True, float("inf")),
    "weight_decay": (0, True, float("inf")),
    "adam_beta1": (0, True, 1),
    "adam_beta2": (0, True, 1),
    "adam_epsilon": (0, True, float("inf")),
    "momentum": (0, True, float("inf")),
    "max_grad_norm": (0, True, float("inf")),
    "warmup_steps": (0, True, float("inf")),
    "label_smoothing_factor": (0, True, 1),
    "z_loss": (0, True, float("inf")),
    "logging_steps": (1, True, float("inf")),
    "eval_steps": (1, True, float("inf")),
    "save_steps": (0, True, float("inf")),
    "save_total_limit": (1, True, float("inf")),
    "max_overhead": (0, False, 1),
    "max_tags": (1, True, float("inf")),
    "seed": (0, True, 2**32 - 1),
}


def build_config(config: TrainConfig | None, options: dict[str, Any]) -> TrainConfig:
    """The checked configuration: `config` (or the defaults) with `options` on top.

    Raises:
        TypeError: an option that does not exist (a close one is named), or a wrong `config`.
        ValueError: a value of the wrong type or out of range; the sentence names the field.
    """
    if config is not None and not isinstance(config, TrainConfig):
        raise TypeError(f"train: expected config of type TrainConfig, got {type(config).__name__}")
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"the closest is {close[0]!r}" if close else f"there are {', '.join(names)}"
            raise TypeError(f"train: expected a known option, got {name!r}; {hint}")
    built = dataclasses.replace(config or TrainConfig(), **options)
    for name in ("output_dir", "resume_from_checkpoint"):
        value: Any = getattr(built, name)
        if isinstance(value, os.PathLike):
            built = dataclasses.replace(built, **{name: os.fspath(value)})
    for name in ("include", "exclude", "ignore"):
        value = getattr(built, name)
        # As `watch` takes them, but for compiled patterns: they are kept as JSON.
        some: Any = () if value is None else (value,) if isinstance(value, str) else value
        some = tuple(some) if isinstance(some, Iterable) else some
        built = dataclasses.replace(built, **{name: some})
    _check_types(built)
    _check_values(built)
    return built


def _check_types(config: TrainConfig) -> None:
    for name, hint in typing.get_type_hints(TrainConfig).items():
        value = getattr(config, name)
        if not _matches(value, hint):
            raise ValueError(f"train: expected {name} {_describe(hint)}, got {value!r}")


def _matches(value: object, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        part = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_matches(each, part) for each in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:  # True is an int to Python, but never what was meant
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "to be one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"to be a list of type {typing.get_args(hint)[0].__name__}"
    parts = typing.get_args(hint) or (hint,)
    names = ["None" if part is type(None) else part.__name__ for part in parts]
    return "of type " + " or ".join(names)


def _check_values(config: TrainConfig) -> None:
    for name, (low, inclusive, high) in _RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        # Only the clipping has a use for infinity: it measures and never clips.
        finite = name == "max_grad_norm" or math.isfinite(value)
        if not finite or not (low <= value <= high) or (value == low and not inclusive):
            limit = f"{'at least' if inclusive else 'above'} {low}"
            if high != float("inf"):
                limit += f" and at most {high}"
            elif value == float("inf"):
                limit += " and finite"
            raise ValueError(f"train: expected {name} {limit}, got {value!r}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(config, name) == 1:
            raise ValueError(f"train: expected {name} at least 0 and below 1, got 1")
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(f"train: expected max_steps at least 1 (or -1), got {config.max_steps}")
    run = config.run_name
    if run is not None and (run in ("", ".", "..") or {"/", os.sep, "\0"} & set(run)):
        raise ValueError(f"train: expected run_name to be the name of a folder, got {run!r}")
    if config.device is not None:
        _check_device(config.device)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train: expected device like 'cpu' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"train: expected device on this machine ({count} CUDA), got {name!r}")
