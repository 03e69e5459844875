"""Bad input: a sentence with what was expected and what came, and nothing half-written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pyvizllm.telemetry.append_file import AppendFile
from pyvizllm.training import TrainConfig, train

MODEL = nn.Linear(4, 3)
DATA = TensorDataset(torch.randn(8, 4), torch.randint(3, (8,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, r"expected max_steps at least 1 \(or -1\), got 0"),
        ({"num_train_epochs": 0}, "expected num_train_epochs above 0, got 0"),
        ({"adam_beta2": 1}, "expected adam_beta2 at least 0 and below 1, got 1"),
        ({"learning_rate": -1.0}, "expected learning_rate at least 0, got -1.0"),
        ({"learning_rate": float("nan")}, "expected learning_rate at least 0, got nan"),
        ({"label_smoothing_factor": 2}, "label_smoothing_factor at least 0 and at most 1, got 2"),
        ({"max_steps": 1.5}, "expected max_steps of type int, got 1.5"),
        ({"max_steps": True}, "expected max_steps of type int, got True"),
        ({"bf16": 1}, "expected bf16 of type bool, got 1"),
        ({"eval_steps": "10"}, "expected eval_steps of type int or None, got '10'"),
        ({"optim": "lion"}, "expected optim to be one of 'adamw', 'sgd', got 'lion'"),
        ({"device": "tpu"}, "expected device like 'cpu' or 'cuda:0', got 'tpu'"),
        ({"device": "cuda:99"}, r"on this machine \(\d+ CUDA\), got 'cuda:99'"),
        ({"run_name": "../elsewhere"}, "expected run_name to be the name of a folder"),
        ({"run_name": "a\0b"}, "expected run_name to be the name of a folder"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs above 0 and finite, got inf"),
        ({"learning_rate": float("inf")}, "learning_rate at least 0 and finite, got inf"),
    ],
)
def test_values(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^train: .*" + message):
        train(MODEL, DATA, output_dir=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [self.linear(inputs)]


def no_gradient(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch[0]).detach().mean()


FROZEN = nn.Linear(4, 3).requires_grad_(False)
OTHER = torch.optim.SGD(nn.Linear(2, 2).parameters())
PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau(OTHER)
STEPPED = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(MODEL.parameters()), 1)
INPUTS, TARGETS = DATA.tensors
LBFGS = torch.optim.LBFGS(MODEL.parameters())


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (MODEL, DATA, {"lerning_rate": 1}, TypeError, "the closest is 'learning_rate'"),
        (MODEL, DATA, {"lr": 1}, TypeError, "got 'lr'; there are .*learning_rate"),
        (MODEL, DATA, {"config": {}}, TypeError, "config of type TrainConfig, got dict"),
        ("gpt2", DATA, {}, TypeError, "model of type nn.Module, got str"),
        (FROZEN, DATA, {}, ValueError, "a model with trainable parameters, got none"),
        (MODEL, DATA, {"loss_fn": 3}, TypeError, r"expected loss_fn\(model, batch\), got int"),
        (MODEL, DATA, {"optimizer": "adam"}, TypeError, "a torch.optim.Optimizer .* got str"),
        (MODEL, DATA, {"optimizer": OTHER, "lr_scheduler": PLATEAU}, TypeError, "takes no metric"),
        (MODEL, DATA, {"lr_scheduler": STEPPED}, ValueError, "over the optimizer passed with it"),
        (MODEL, DATA, {"optimizer": LBFGS}, ValueError, "step.. takes no closure, got LBFGS"),
        (MODEL, DATA, {"optimizer": OTHER}, ValueError, "model's parameters, got SGD over none"),
        (nn.LazyLinear(3), DATA, {}, ValueError, "whose parameters have shapes, got a lazy"),
        (MODEL, DATA, {"loss_fn": no_gradient}, ValueError, "a loss that depends on the model"),
        (MODEL, DATA, {"loss_fn": lambda m, b: (m(b[0]).sum(), 1)}, ValueError, r"\(Tensor, int\)"),
        (MODEL, {"x": INPUTS}, {}, TypeError, "a dataset, .* got dict"),
        (MODEL, [], {}, ValueError, "at least one example, got an empty dataset"),
        (MODEL, iter([]), {"max_steps": 3}, ValueError, "at least one batch, got none"),
        (MODEL, 3, {}, TypeError, "expected data to be a dataset, .* got int"),
        (MODEL, iter([DATA[0]]), {}, ValueError, "expected max_steps .* without a length"),
        (MODEL, [INPUTS], {}, ValueError, r"batches of \(inputs, targets\), got Tensor"),
        (MODEL, [(INPUTS, TARGETS, 1)], {}, ValueError, "got 3 of them"),
        (MODEL, [(INPUTS, TARGETS.float())], {}, ValueError, "of class indices, got torch.float32"),
        (MODEL, [(INPUTS, TARGETS[:5])], {}, ValueError, r"logits \[8, 3\] and targets \[5\]"),
        (Generator(), DATA, {}, ValueError, "the model to return logits, got list"),
        (MODEL, DATA, {"loss_fn": lambda m, b: m(b[0])}, ValueError, r"got shape \[8, 3\]"),
        (MODEL, [(INPUTS, TARGETS + 3)], {}, IndexError, "out of bounds"),
    ],
)
def test_arguments(
    tmp_path: Path,
    model: Any,
    data: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        train(model, data, output_dir=tmp_path, disable_tqdm=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_eval_data(tmp_path: Path) -> None:
    for data, message in [(iter([DATA[0]]), "more than once"), ([], "an empty dataset")]:
        with pytest.raises(ValueError, match=message):
            train(MODEL, DATA, data, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_output_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"expected output_dir .* can be written, got '.*file/"):
        train(MODEL, DATA, output_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_existing_run_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path), run_name="run", disable_tqdm=True)
    train(MODEL, DATA, config=config, max_steps=3)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match="run_name of a new run, got 'run', which exists"):
        train(MODEL, DATA, config=config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    result = train(MODEL, DATA, config=config, max_steps=2, overwrite_output_dir=True)
    names = [path.name for path in (result.run_dir / "checkpoints").glob("step-*")]
    assert names == ["step-2"]
    assert len(list(result.run_dir.glob("events.*"))) == 1
    assert (result.run_dir / "notes.txt").read_text() == "mine"


def test_state_that_could_not_be_read_back(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return Path("/")

        def set_extra_state(self, state: Any) -> None:
            assert isinstance(state, Path)

    model = Extra(4, 3)
    with pytest.raises(ValueError, match=r"got PosixPath in model\['_extra_state'\]"):
        train(model, DATA, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    result = train(model, DATA, output_dir=tmp_path, save_steps=0, disable_tqdm=True)
    assert result.checkpoint is None


def test_sparse_gradients_that_cannot_be_clipped(tmp_path: Path) -> None:
    model = nn.Embedding(4, 3, sparse=True)
    data = TensorDataset(torch.arange(8) % 4, TARGETS)
    with pytest.raises(TypeError, match="dense gradients to clip, got sparse ones"):
        train(
            model,
            data,
            output_dir=tmp_path,
            optimizer=torch.optim.SparseAdam(model.parameters()),
            telemetry=False,
            disable_tqdm=True,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_users_error_is_not_hidden_by_a_run_folder_that_is_gone(tmp_path: Path) -> None:
    def deletes_the_run(model: nn.Module, batch: Any) -> torch.Tensor:
        shutil.rmtree(tmp_path / "run")
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(MODEL, DATA, output_dir=tmp_path, run_name="run", loss_fn=deletes_the_run)


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_at_the_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(ValueError, match=r"a folder that can be written.*No space left"):
            train(MODEL, DATA, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(AppendFile, "_write", full_disk)
    with pytest.raises(OSError, match=r"cannot write to the run folder.*No space left"):
        train(MODEL, DATA, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
