"""A resumed run is the uninterrupted run: every loss, every weight, the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyvizllm.training import TrainResult, train

STEPS = 11


class Examples(Dataset[Any]):
    """26 examples with random noise: the data draws from the same numbers as the dropout."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.sin(torch.arange(6.0) * index) + 0.1 * torch.randn(6), index % 3


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))


def losses(result: TrainResult) -> dict[float, float]:
    return {e["step"]: e["train/loss"] for e in result.history if "train/loss" in e}


def loader(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4, shuffle=True)


def own_generator(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))


def dataset(data: Any) -> Any:
    return data


# 26 examples in batches of 4 are 7 batches, in windows of 2: 4 steps an epoch, the last of one
# small batch. Checkpoints at 3 (mid-epoch), 6 (mid-epoch), 9; published every 2 steps or each.
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 0.02,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "disable_tqdm": True,
    "save_steps": 3,
    "run_name": "run",
}


# From Python 3.12 on, forking a worker beside the publisher's thread is warned of.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (dataset, {"logging_steps": 1}),
        (dataset, {"logging_steps": 2, "optim": "sgd", "eval_steps": 2}),
        (dataset, {"logging_steps": 1, "bf16": True, "dataloader_num_workers": 1}),
        (loader, {"logging_steps": 1}),
        (own_generator, {"logging_steps": 1}),
    ],
)
def test_same_losses(tmp_path: Path, make: Callable[[Any], Any], options: dict[str, Any]) -> None:
    options = {**OPTIONS, **options, "output_dir": tmp_path}
    evaluation = loader(Examples()) if "eval_steps" in options else None
    whole_model, whole_data = model(), make(Examples())
    whole = train(whole_model, whole_data, evaluation, **options)
    expected = losses(whole)
    assert max(expected) == STEPS
    assert whole.checkpoint is not None
    for step in (3, 6):
        # As if the run had been killed after the checkpoint of `step`, some steps later.
        resumed_model = model(seed=99)
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step}"
        resumed = train(
            resumed_model,
            make(Examples()),
            evaluation,
            **options,
            resume_from_checkpoint=checkpoint,
        )
        assert losses(resumed) == {at: loss for at, loss in expected.items() if at > step}
        assert resumed.run_dir == whole.run_dir
        assert resumed.checkpoint == whole.checkpoint
        state = whole_model.state_dict()
        for name, value in resumed_model.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_events_of_a_resumed_run(tmp_path: Path) -> None:
    options = {**OPTIONS, "output_dir": tmp_path, "logging_steps": 1}
    whole = train(model(), Examples(), **options)
    # The run was killed at step 8; then taken up from "the latest", which is step 6.
    for step in (9, 11):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-6\n")
    resumed = train(model(5), Examples(), **options, resume_from_checkpoint=True)
    assert list(losses(resumed)) == [7, 8, 9, 10, 11]
    accumulator = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0})
    accumulator.Reload()
    shown = {e.step: e.value for e in accumulator.Scalars("train/loss")}
    assert shown == pytest.approx(losses(whole))
    # One value a step: those after the checkpoint were purged and written again.
    assert len(accumulator.Scalars("train/loss")) == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_fresh_runs_are_reproducible_and_apart(tmp_path: Path) -> None:
    options = {**OPTIONS, "output_dir": tmp_path, "logging_steps": 1, "save_steps": 0}
    del options["run_name"]
    first = train(model(), Examples(), **options)
    second = train(model(), Examples(), **options)
    other = train(model(), Examples(), **options, seed=1)
    assert losses(first) == losses(second)
    assert losses(first) != losses(other)
    assert len({first.run_dir, second.run_dir, other.run_dir}) == 3
    assert first.checkpoint is None
    assert not (first.run_dir / "checkpoints").exists()


def test_going_further_than_the_first_time(tmp_path: Path) -> None:
    options = {**OPTIONS, "output_dir": tmp_path, "lr_scheduler_type": "constant"}
    options |= {"logging_steps": 1, "run_name": None}
    short = train(model(), Examples(), **{**options, "max_steps": 5})
    assert short.checkpoint is not None
    assert short.checkpoint.name == "step-5"
    longer = train(model(1), Examples(), **options, resume_from_checkpoint=True)
    whole = train(model(), Examples(), **options)
    assert longer.run_dir == short.run_dir
    assert losses(short) | losses(longer) == losses(whole)
    done = train(model(1), Examples(), **options, resume_from_checkpoint=longer.run_dir)
    assert (done.history, done.checkpoint) == ([], longer.checkpoint)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_going_further_follows_the_longer_schedule_at_once(tmp_path: Path, schedule: str) -> None:
    options = {**OPTIONS, "output_dir": tmp_path, "lr_scheduler_type": schedule}
    options |= {"logging_steps": 1, "max_steps": 5}
    train(model(), Examples(), **options)
    options["max_steps"] = STEPS
    longer = train(model(1), Examples(), **options, resume_from_checkpoint=True)
    whole = train(model(), Examples(), **{**options, "run_name": "whole"})
    rates = [[h["train/learning_rate"] for h in result.history] for result in (longer, whole)]
    assert len(rates[0]) == STEPS - 5
    assert rates[0] == rates[1][5:]


def test_checkpoint_opens_without_code_and_old_ones_go(tmp_path: Path) -> None:
    trained = model()
    options = {**OPTIONS, "output_dir": tmp_path, "save_steps": 2, "save_total_limit": 2}
    result = train(trained, Examples(), **options)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-10", "step-11"]
    assert result.checkpoint == folder / "step-11"
    weights = torch.load(folder / "step-11" / "model.pt", weights_only=True)
    for name, value in trained.state_dict().items():
        assert torch.equal(weights[name], value)
    training = torch.load(folder / "step-11" / "training.pt", weights_only=True)
    assert (training["step"], training["epoch"]) == (11, 2)
    # Two whole epochs, and three windows of 2 batches of 4.
    assert training["tokens_seen"] == 26 + 26 + 24
    assert training["position"]["consumed"] == 6
    assert training["optimizer"]["state"][0]["step"] == 11
    config = json.loads((folder / "step-11" / "config.json").read_text())
    assert config["save_total_limit"] == 2


def test_a_run_name_makes_a_branch(tmp_path: Path) -> None:
    options = {**OPTIONS, "output_dir": tmp_path, "logging_steps": 1}
    whole = train(model(), Examples(), **options)
    before = sorted((tmp_path / "run").rglob("*"))
    branch = train(
        model(2),
        Examples(),
        **{**options, "run_name": "branch"},
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step-9"),
    )
    assert branch.run_dir == tmp_path / "branch"
    assert losses(branch) == {at: loss for at, loss in losses(whole).items() if at > 9}
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_resume_with_other_data_or_model(tmp_path: Path) -> None:
    options = {**OPTIONS, "output_dir": tmp_path}
    train(model(), Examples(), **options)
    resume: dict[str, Any] = {**options, "resume_from_checkpoint": True}
    events = sorted((tmp_path / "run").iterdir())
    few = TensorDataset(torch.randn(9, 6), torch.zeros(9, dtype=torch.int64))
    for data, changed, message in [
        (few, {}, r"\(examples 26\), got examples 9"),
        (Examples(), {"per_device_train_batch_size": 5}, r"\(batch size 4\), got batch size 5"),
        (Examples(), {"seed": 7}, r"\(seed 42\), got seed 7"),
    ]:
        with pytest.raises(ValueError, match="the same data as in the checkpoint.*" + message):
            train(model(), data, **{**resume, **changed})
    with pytest.raises(ValueError, match="expected the model and optimizer of the checkpoint"):
        train(nn.Linear(6, 3), Examples(), **resume)
    assert sorted((tmp_path / "run").iterdir()) == events


@pytest.mark.parametrize("file", ["model.pt", "training.pt", "config.json"])
def test_broken_checkpoint(tmp_path: Path, file: str) -> None:
    options = {**OPTIONS, "output_dir": tmp_path, "max_steps": 2}
    result = train(model(), Examples(), **options)
    assert result.checkpoint is not None
    (result.checkpoint / file).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"expected a whole checkpoint in '.*step-2', got: "):
        train(model(), Examples(), **options, resume_from_checkpoint=result.checkpoint)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "training.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"expected a checkpoint written by train, got .* which has no "
    ):
        train(model(), Examples(), output_dir=tmp_path, resume_from_checkpoint=tmp_path)


@pytest.mark.parametrize("resume", [True, "nowhere"])
def test_no_checkpoint(tmp_path: Path, resume: bool | str) -> None:
    with pytest.raises(ValueError, match="expected resume_from_checkpoint to find one, got none"):
        train(model(), Examples(), output_dir=tmp_path, resume_from_checkpoint=resume)
    assert list(tmp_path.iterdir()) == []


def test_another_optimizer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    train(model(), Examples(), output_dir=tmp_path, **{**OPTIONS, "max_steps": 3})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=r"optimizer of the checkpoint .*, got SGD, .* momentum"):
        train(
            model(),
            Examples(),
            output_dir=tmp_path,
            resume_from_checkpoint=True,
            optim="sgd",
            **OPTIONS,
        )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("saved", "sentence"), [([1], "written by train, got"), ({"step": 1}, "has no data, lr_sched")]
)
def test_checkpoint_of_another_program(tmp_path: Path, saved: Any, sentence: str) -> None:
    torch.save({}, tmp_path / "model.pt")
    torch.save(saved, tmp_path / "training.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=sentence):
        train(model(), Examples(), output_dir=tmp_path, resume_from_checkpoint=tmp_path)


def test_other_optimizer_settings_are_not_silently_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**OPTIONS, "output_dir": tmp_path}
    train(model(), Examples(), **{**options, "max_steps": 3})
    assert "goes on with" not in caplog.text
    train(model(), Examples(), **{**options, "learning_rate": 0.5}, resume_from_checkpoint=True)
    assert "checkpoint's settings: learning_rate 0.02 (not 0.5)" in caplog.text
