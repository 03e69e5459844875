"""Checkpoints appear whole or not at all."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyvizllm.training.checkpoint import (
    check_plain,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def save(run: Path, step: int, value: float = 0.0, keep: int | None = None) -> Path:
    model = {"weight": torch.full((3,), value)}
    return save_checkpoint(
        run, step, model=model, training={"step": step}, config={"seed": 1}, keep=keep
    )


def test_round_trip_and_replacement(tmp_path: Path) -> None:
    path = save(tmp_path, 4, 1.0)
    assert path == tmp_path / "checkpoints" / "step-4"
    assert save(tmp_path, 4, 2.0) == path
    model, training, config = load_checkpoint(path)
    assert torch.equal(model["weight"], torch.full((3,), 2.0))
    assert (training, config) == ({"step": 4}, {"seed": 1})
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step-4"]


def test_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 4, 1.0)
    original = torch.save

    def full_disk(value: Any, file: Path) -> None:
        if file.name == "training.pt":
            raise OSError(28, "No space left on device")
        original(value, file)

    monkeypatch.setattr(torch, "save", full_disk)
    for step in (4, 5):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, step, 2.0)
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step-4"]
    assert latest_checkpoint(tmp_path) == path
    assert torch.equal(load_checkpoint(path)[0]["weight"], torch.ones(3))


def test_torchs_error_of_a_full_disk_becomes_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(value: Any, file: Path) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(torch, "save", full_disk)
    sentence = r"train: expected to write a checkpoint of step 5 to .* \([\d,]+ bytes are free"
    with pytest.raises(OSError, match=sentence):
        save(tmp_path, 5)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_limit_counts_by_number_and_spares_later_steps(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-100"
    # Taken up again at 9: what was written last is the latest, and 100 is not ours to delete.
    save(tmp_path, 11, keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-10", "step-100", "step-11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-11"
    for content in ("", "step-7\n"):  # cut off by a power failure; of a folder that is gone
        (tmp_path / "checkpoints" / "latest").write_text(content)
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-100"
    (tmp_path / "checkpoints" / "latest").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-100"


def test_left_overs_of_a_killed_write_go(tmp_path: Path) -> None:
    stale = tmp_path / "checkpoints" / ".step-3-abc"
    stale.mkdir(parents=True)
    (stale / "model.pt").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 3)
    assert not stale.exists()


def test_find(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 7), save(tmp_path / "b", 2)
    assert find_checkpoint(str(first), "", None) == first
    assert find_checkpoint(str(tmp_path / "a"), "", None) == first
    assert find_checkpoint(True, str(tmp_path), "a") == first
    assert find_checkpoint(True, str(tmp_path), None) == second  # the last one written
    with pytest.raises(ValueError, match=r"got none in '.*c'"):
        find_checkpoint(True, str(tmp_path), "c")


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.0, None, True, "x", (torch.zeros(1), OrderedDict(b=3))]},
        torch.optim.AdamW([torch.zeros(2, requires_grad=True)]).state_dict(),
    ],
)
def test_plain_values_load_again(tmp_path: Path, value: Any) -> None:
    check_plain("state", value)
    torch.save(value, tmp_path / "value.pt")
    loaded = torch.load(tmp_path / "value.pt", weights_only=True)
    assert loaded == value


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), object(), {1, 2}])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"got {type(value).__name__} in state\['a'\]\[1\]"):
        check_plain("state", {"a": [0, value]})
