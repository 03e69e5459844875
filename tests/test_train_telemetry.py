"""What `train` shares with `watch`: what is watched, what is shown of it, and where."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyvizllm
from pyvizllm.telemetry import Finding, HistorySink, Publication, read_history
from pyvizllm.training import TrainResult, train


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def examples(bad: float = 0.0) -> TensorDataset:
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    targets = inputs[:, :3].argmax(1)
    inputs[20, 0] += bad
    return TensorDataset(inputs, targets)


def fit(folder: Path, data: Any, **options: Any) -> TrainResult:
    return train(model(), data, output_dir=folder, disable_tqdm=True, **options)


def hparams(result: TrainResult) -> dict[str, Any]:
    metadata = EventAccumulator(str(result.run_dir)).Reload().summary_metadata
    content = metadata["_hparams_/session_start_info"].plugin_data.content
    values = parse_session_start_info_plugin_data(content).hparams.items()
    return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in values}


def test_only_what_is_asked_for_is_watched(tmp_path: Path) -> None:
    def watched(**options: Any) -> set[str]:
        shown = fit(tmp_path, examples(), **options).metrics
        return {tag.partition("/")[2] for tag in shown if tag.startswith("grad_norm/")}

    assert watched(exclude="bias") == {"0.weight", "2.weight"}
    assert watched(include=[r"^2\."], exclude=None) == {"2.weight", "2.bias"}
    assert watched(include=("weight", "bias"), exclude=["0"]) == {"2.weight", "2.bias"}


def test_tags_are_no_more_than_asked_for(tmp_path: Path) -> None:
    result = fit(tmp_path, examples(), max_tags=20)
    (notice,) = [
        entry["texts"]["pyvizllm/notice"]
        for entry in read_history(result.run_dir / "history.jsonl")
        if "pyvizllm/notice" in entry.get("texts", {})
    ]
    assert "max_tags=20" in notice
    assert len(EventAccumulator(str(result.run_dir)).Reload().Tags()["histograms"]) < 24


@pytest.mark.parametrize(("ignore", "rules"), [("non_finite", []), (None, ["non_finite"])])
def test_a_rule_that_is_ignored_finds_nothing(
    tmp_path: Path, ignore: str | None, rules: list[str]
) -> None:
    result = fit(tmp_path, examples(math.nan), ignore=ignore, logging_steps=1)
    assert [f.rule for f in result.findings if f.rule == "non_finite"] == rules
    entries = read_history(result.run_dir / "history.jsonl")
    assert [f.rule for f in result.findings] == [
        finding["rule"] for entry in entries for finding in entry.get("findings", [])
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "("}, r"train: expected include to hold regular expressions, got '\('"),
        ({"exclude": "."}, "train: expected include and exclude to leave a parameter over"),
        ({"exclude": 3}, "train: expected exclude to be a list of type str, got 3"),
        ({"ignore": ["divergence", 3]}, "train: expected ignore to be a list of type str, got"),
        ({"ignore": ["typo"]}, "ignore to name rules, of .*non_finite.*; got typo"),
        ({"max_tags": 0}, "train: expected max_tags at least 1, got 0"),
    ],
)
def test_what_cannot_be_watched_is_a_sentence_and_no_folder(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, examples(), **options)
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_runs_has_the_settings(tmp_path: Path) -> None:
    options = {"learning_rate": 0.25, "weight_decay": 0.5, "warmup_steps": 1, "adam_beta2": 0.75}
    result = fit(tmp_path, examples(), per_device_train_batch_size=16, **options)
    assert hparams(result) == {
        **options,
        "adam_beta1": 0.9,
        "adam_epsilon": 1e-8,
        "bf16": False,
        "gradient_accumulation_steps": 1.0,
        "label_smoothing_factor": 0.0,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "max_steps": 2.0,
        "optim": "AdamW",
        "per_device_train_batch_size": 16.0,
        "seed": 42.0,
        "z_loss": 0.0,
    }


def test_settings_that_are_not_in_force_are_not_shown(tmp_path: Path) -> None:
    own = model()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.5, momentum=0.25)
    result = train(
        own,
        DataLoader(examples(), batch_size=4),
        loss_fn=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1),
        output_dir=tmp_path,
        disable_tqdm=True,
    )
    assert hparams(result) == {
        "bf16": False,
        "gradient_accumulation_steps": 1.0,
        "learning_rate": 0.5,
        "lr_scheduler_type": "StepLR",
        "max_grad_norm": 1.0,
        "max_steps": 8.0,
        "momentum": 0.25,
        "optim": "SGD",
        "seed": 42.0,
        "weight_decay": 0.0,
    }


def test_a_resumed_optimizer_s_settings_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    first = fit(tmp_path, examples(), max_steps=2, learning_rate=0.25)
    resumed = fit(
        tmp_path,
        examples(),
        max_steps=3,
        learning_rate=0.5,
        run_name="branch",
        resume_from_checkpoint=first.run_dir,
    )
    assert hparams(resumed)["learning_rate"] == 0.25
    assert hparams(resumed)["max_steps"] == 3.0


def test_a_result_is_one_line(tmp_path: Path) -> None:
    result = fit(tmp_path, examples(), eval_data=examples(), run_name="a", max_steps=4)
    loss, eval_loss = (result.metrics[f"{part}/loss"] for part in ("train", "eval"))
    assert 0 < loss != eval_loss
    finding = Finding("plateau", "info", 3, "", "", {})
    for findings, said in ([], "0 findings"), ([finding], "1 finding"), ([finding] * 2, "2 find"):
        assert repr(dataclasses.replace(result, findings=findings)).startswith(
            f"<TrainResult: step 4, loss {loss:.4f}, eval loss {eval_loss:.4f}, {said}"
        )
    assert repr(result).endswith(f", run_dir {str(tmp_path / 'a')!r}>")
    assert repr(TrainResult({}, [], Path("x"), None)) == "<TrainResult: 0 findings, run_dir 'x'>"


def test_where_the_run_is_stands_above_the_bar(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, examples(), run_name="silent")
    assert capfd.readouterr() == ("", "")
    train(model(), examples(), output_dir=tmp_path, run_name="a\x1b")
    shown = capfd.readouterr().err
    assert f"train: the run is in {tmp_path / 'a'}\\x1b\n" in shown
    assert shown.index("the run is in") < shown.index("4/4")


def test_sinks_are_closed_where_a_watch_cannot_begin(tmp_path: Path) -> None:
    class Sink(HistorySink):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    (tmp_path / "file").write_text("")
    sink = Sink()
    with pytest.raises(OSError, match="file"):
        pyvizllm.watch(model(), None, tmp_path / "file" / "run", sinks=[sink])
    assert sink.closed == 1
    watch = pyvizllm.watch(model(), None, tmp_path / "run", sinks=[sink])
    watch.publisher.submit(lambda: Publication(1, 0.0, {"train/loss": 1.0}))
    watch.close()
    assert (sink.closed, sink.history) == (2, [{"step": 1, "train/loss": 1.0}])


def test_a_training_that_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything of the run stays in one place, which the result names."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        os.chdir(there)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    result = train(
        model(), examples(), loss_fn=loss_fn, max_steps=4, logging_steps=2, disable_tqdm=True
    )
    assert result.run_dir.parent.parent == here
    names = {path.name for path in result.run_dir.iterdir()}
    assert {"config.json", "history.jsonl", "trajectory.npz"} <= names
    assert result.checkpoint is not None
    assert result.checkpoint.is_relative_to(result.run_dir)
    assert not any(there.iterdir())
