"""Where a run is: the name of a new one, a rank's folder, and what a failed start leaves."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch


def fresh_name() -> str:
    """Of a new run: runs that start in the same second are apart, whatever is seeded."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def run_folder(logdir: str | os.PathLike[str] | None) -> Path:
    """The run's folder, which stays where it is should the training change its directory."""
    if logdir is None:
        return Path("runs", fresh_name()).absolute()
    rank = _rank()
    folder = Path(logdir).absolute()
    return folder if rank == 0 else rank_folder(folder, rank)


def rank_folder(folder: Path, rank: int) -> Path:
    """Of a process other than the first of those that train one model, in the run's folder."""
    return folder / f"rank{rank}"


def _rank() -> int:
    """Of this process among those that train one model."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove `folders`, the innermost first, as far as nothing is in them."""
    for folder in folders:
        with suppress(OSError):  # somebody else's file is in it
            folder.rmdir()
