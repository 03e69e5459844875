"""The folder of a run: output_dir/run_name with config.json, events, history and checkpoints."""

import dataclasses
import json
import shutil
from pathlib import Path

from pyvizllm.telemetry.flight_recorder import FOLDER as FLIGHTS
from pyvizllm.telemetry.folder import fresh_name, remove_empty
from pyvizllm.telemetry.jsonl import HISTORY
from pyvizllm.telemetry.trajectory import FILE as TRAJECTORY
from pyvizllm.training.config import TrainConfig

FILES = (HISTORY, "config.json", TRAJECTORY)


def choose_run_folder(config: TrainConfig, checkpoint: Path | None) -> tuple[Path, bool]:
    """(the run's folder, whether it goes on there); nothing is written.

    A resumed run goes on in the folder of its checkpoint, unless run_name names another one.
    """
    # Absolute: it stays where it is should the training change its directory.
    folder = Path(config.output_dir).absolute() / (config.run_name or fresh_name())
    owner = _owner(checkpoint)
    in_place = owner is not None and (
        config.run_name is None or folder.resolve() == owner.resolve()
    )
    return (owner.absolute(), True) if in_place and owner is not None else (folder, False)


def make_run_folder(config: TrainConfig, folder: Path, in_place: bool) -> None:
    """Make the run's folder and write config.json into it.

    Raises:
        ValueError: the folder cannot be written, or holds another run.
    """
    made = False
    try:
        if not in_place and folder.is_dir() and any(folder.iterdir()):
            if not config.overwrite_output_dir:
                raise ValueError(
                    f"train: expected run_name of a new run, got {folder.name!r}, which exists in "
                    f"'{config.output_dir}' (resume_from_checkpoint goes on with it, "
                    "overwrite_output_dir replaces it)"
                )
            for own in (*folder.glob("rank[1-9]*"), folder):
                delete_run(own)
        folder.mkdir(parents=True, exist_ok=True)
        made = not in_place
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        (folder / "config.json").write_text(text)
    except OSError as error:
        if made:
            delete_run(folder)
        raise ValueError(
            f"train: expected output_dir to be a folder that can be written, got '{folder}' "
            f"({error.strerror})"
        ) from error


def _owner(checkpoint: Path | None) -> Path | None:
    if checkpoint is None or checkpoint.resolve().parent.name != "checkpoints":
        return None
    return (
        checkpoint.parent.parent if checkpoint.parent.name else checkpoint.resolve().parent.parent
    )


def delete_run(folder: Path) -> None:
    """Delete what a process of a run writes, and nothing that somebody else put beside it."""
    if not folder.is_dir():  # somebody was faster
        return
    for path in [*folder.glob("events.out.tfevents.*"), *(folder / name for name in FILES)]:
        path.unlink(missing_ok=True)
    for name in ("checkpoints", FLIGHTS):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    remove_empty([folder])
