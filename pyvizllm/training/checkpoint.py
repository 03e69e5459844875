"""Checkpoints: folders `checkpoints/step-N` that appear whole or not at all.

    model.pt      the model's state_dict, for any torch program
    training.pt   optimizer, schedule, random numbers, position in the data, step, tokens seen
    config.json   the options of the run

All of it loads with torch.load(weights_only=True), so opening a checkpoint runs no code.
"""

import json
import os
import shutil
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_plain",
    "find_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]

_LATEST = "latest"  # a file with the name of the checkpoint that was written last


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model: dict[str, Any],
    training: dict[str, Any],
    config: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write `run_dir/checkpoints/step-N` atomically; then delete all but the newest `keep`.

    Checkpoints of later steps (the run was resumed from an earlier one) are left alone.

    Raises:
        OSError: it cannot be written (a full disk); earlier checkpoints are as they were.
    """
    folder = run_dir / "checkpoints"
    try:
        target = _write(folder, step, model, training, config)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        free = _free_bytes(run_dir)
        raise OSError(
            f"train: expected to write a checkpoint of step {step} to '{folder}', got: {error}"
            + ("" if free is None else f" ({free:,} bytes are free there)")
        ) from error
    if keep is not None:
        _prune(folder, step, keep)
    return target


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _write(
    folder: Path,
    step: int,
    model: dict[str, Any],
    training: dict[str, Any],
    config: dict[str, Any],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".step-*"):  # a write that was cut off
        shutil.rmtree(stale)
    target = folder / f"step-{step}"
    temporary = Path(tempfile.mkdtemp(prefix=f".step-{step}-", dir=folder))
    try:
        torch.save(model, temporary / "model.pt")
        torch.save(training, temporary / "training.pt")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in temporary.iterdir():
            _to_disk(file)
        temporary.chmod(0o755)  # mkdtemp makes it private to the user
        if target.exists():
            # rename cannot replace a folder that holds something: move the old one aside first.
            aside = temporary.with_name(temporary.name + "-old")
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _write_latest(folder, target.name)
    return target


def _to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _write_latest(folder: Path, name: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".latest-", dir=folder)
    with os.fdopen(handle, "w") as file:
        file.write(name + "\n")
    Path(temporary).replace(folder / _LATEST)


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def _prune(folder: Path, step: int, keep: int) -> None:
    reached = [saved for saved in _steps(folder) if saved <= step]
    for old in reached[:-keep]:
        shutil.rmtree(folder / f"step-{old}")


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of a run that was written last, or None."""
    folder = run_dir / "checkpoints"
    if (folder / _LATEST).is_file():
        named = folder / (folder / _LATEST).read_text().strip()
        # Empty after a power cut, or of a checkpoint that was deleted: then the files decide.
        if (named / "training.pt").is_file():
            return named
    steps = _steps(folder)
    return folder / f"step-{steps[-1]}" if steps else None


def find_checkpoint(resume: bool | str, output_dir: str, run_name: str | None) -> Path:
    """The folder of the checkpoint that `resume_from_checkpoint` means.

    Raises:
        ValueError: there is none; the sentence says where it was looked for.
    """
    if isinstance(resume, str):
        path = Path(resume)
        if (path / "training.pt").is_file():
            return path
        runs = [path]
    elif run_name is not None:
        path = Path(output_dir) / run_name
        runs = [path]
    else:
        path = Path(output_dir)
        runs = [run for run in path.glob("*") if run.is_dir()]
    found = [checkpoint for run in runs if (checkpoint := latest_checkpoint(run)) is not None]
    if not found:
        raise ValueError(
            f"train: expected resume_from_checkpoint to find one, got none in '{path}'"
        )
    return max(found, key=lambda checkpoint: checkpoint.stat().st_mtime_ns)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(model, training, config) of a checkpoint, tensors on the CPU.

    Raises:
        ValueError: a file is missing, broken, or holds more than tensors and plain values.
    """
    try:
        model = torch.load(path / "model.pt", map_location="cpu", weights_only=True)
        training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
        config = json.loads((path / "config.json").read_text())
    except Exception as error:  # torch.load raises a dozen kinds for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"train: expected a whole checkpoint in '{path}', got: {reason}"
        ) from error
    return model, training, config


def check_plain(name: str, value: Any) -> None:
    """Check before the training that `value` could be read back with weights_only=True.

    Raises:
        ValueError: naming the entry that is neither a tensor nor a plain value.
    """
    # Exact types: a numpy float is a float too, and torch.load refuses it.
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            check_plain(f"{name}[{key!r}]", item)
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(f"{name}[{index}]", item)
    elif not isinstance(value, Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(
            f"train: expected a state of tensors and plain values to checkpoint, got "
            f"{type(value).__name__} in {name} (save_steps=0 trains without checkpoints)"
        )
