"""A Trainer of Hugging Face's with a watch."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from pyvizllm.integrations.trainer import WatchCallback, shown  # noqa: E402
from pyvizllm.telemetry import read_history  # noqa: E402


def trainer(folder, callback, **arguments):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(61, (32, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    training = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"), use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=4, logging_steps=1, **arguments,
    )  # fmt: skip
    return transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        training,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[callback],
    )


def scalars_of(folder):
    """Of each step; step 0 has the settings alone."""
    entries = read_history(folder)
    return {entry["step"]: entry["scalars"] for entry in entries if entry["step"]}


def test_every_step_and_evaluation_is_shown(tmp_path):
    callback = WatchCallback(tmp_path / "run", every=1, histograms=())
    watched = trainer(
        tmp_path, callback, max_steps=6, eval_strategy="steps", eval_steps=3,
        gradient_accumulation_steps=2, max_grad_norm=0.5, save_strategy="no",
    )  # fmt: skip
    watched.train()
    assert repr(callback.watch).startswith("<Watch: step 6, closed")
    history = scalars_of(tmp_path / "run")
    assert list(history) == [1, 2, 3, 4, 5, 6]
    logs = [log for log in watched.state.log_history if "loss" in log]
    rates = [scalars["train/learning_rate"] for scalars in history.values()]
    for log in logs:
        scalars = history[log["step"]]
        assert scalars["train/loss"] == pytest.approx(log["loss"])
        assert scalars["train/logged_grad_norm"] == pytest.approx(log["grad_norm"])
        assert scalars["train/grad_norm"] == pytest.approx(min(0.5, log["grad_norm"]), rel=1e-4)
    assert rates == pytest.approx([log["learning_rate"] for log in logs])
    evaluations = [log for log in watched.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [3, 6]
    for log in evaluations:
        assert history[log["step"]]["eval/loss"] == pytest.approx(log["eval_loss"])


def test_a_training_goes_on_from_a_checkpoint(tmp_path):
    trainer(
        tmp_path, WatchCallback(tmp_path / "run", every=1), max_steps=3, save_steps=3
    ).train()  # fmt: skip
    trainer(tmp_path, WatchCallback(tmp_path / "run", every=1), max_steps=5).train(
        resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-3")
    )
    assert list(scalars_of(tmp_path / "run")) == [1, 2, 3, 4, 5]


def test_a_training_that_raises_is_closed_by_the_next(tmp_path):
    callback = WatchCallback(tmp_path / "run", every=1)
    failing = trainer(tmp_path, callback, max_steps=2, save_strategy="no")

    def fail(*_, **__):
        raise RuntimeError("no loss")

    failing.compute_loss = fail
    with pytest.raises(RuntimeError, match="no loss"):
        failing.train()
    first = callback.watch
    trainer(tmp_path, callback, max_steps=2, save_strategy="no").train()
    assert "closed" in repr(first)
    assert first is not callback.watch
    assert list(scalars_of(tmp_path / "run")) == [1, 2]


def test_what_is_shown_of_the_logs():
    logs = {"loss": 2, "epoch": 0.5, "eval_loss": 1.5, "eval_report": "long", "train_runtime": 3.0}
    assert shown(logs) == {"loss": 2.0, "eval/loss": 1.5}


def test_options_are_those_of_watch(tmp_path):
    wrong = trainer(tmp_path, WatchCallback(tmp_path / "run", every=0), max_steps=1)
    with pytest.raises(ValueError, match="watch: expected every"):
        wrong.train()
