"""One process of test_train_distributed.py, and the trainings that it and the test do alike.

python train_ranks.py FOLDER, with the environment that torchrun sets: does all trainings and leaves
what came of them in the folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyvizllm

FEATURES, CLASSES = 8, 4


def examples(count: int) -> TensorDataset:
    """Every seventh target is ignored: processes and steps have unequal numbers of them."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(0, CLASSES, (count,), generator=generator)
    targets[::7] = -100
    return TensorDataset(torch.randn(count, FEATURES, generator=generator), targets)


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), *between, nn.ReLU(), nn.Linear(16, CLASSES))


def trained(folder: Path, model: nn.Module, data: Any, **options: Any) -> dict[str, Any]:
    """What a training leaves; `options` beside those of all trainings here."""
    options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4} | options
    result = pyvizllm.train(
        model,
        data,
        output_dir=str(folder),
        learning_rate=1e-2,
        logging_steps=2,
        disable_tqdm=True,
        **options,
    )
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        "state": {name: value.clone() for name, value in plain.state_dict().items()},
        "history": [
            {tag: v for tag, v in entry.items() if tag.startswith(("step", "train/", "eval/"))}
            for entry in result.history
        ],
        "run_dir": str(result.run_dir),
        "checkpoint": str(result.checkpoint),
    }


def batches(count: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    tensors = examples(4 * count).tensors
    return lambda: zip(*(tensor.split(4) for tensor in tensors), strict=True)


class Stream:
    """Batches without a length, the same every time."""

    def __init__(self, count: int) -> None:
        self._batches = batches(count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches()


def own_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def dataset(folder: Path, size: int) -> dict[str, Any]:
    """13 batches an epoch: the last step has one batch, which one process borrows of another."""
    return trained(
        folder / "dataset", mlp(), examples(50), eval_data=examples(21), eval_steps=4,
        num_train_epochs=3, gradient_accumulation_steps=6 // size,
    )  # fmt: skip


def loader(folder: Path, size: int) -> dict[str, Any]:
    return trained(
        folder / "loader", mlp(), DataLoader(examples(50), batch_size=4, shuffle=True),
        num_train_epochs=2, loss_fn=own_loss, gradient_accumulation_steps=2 // size,
    )  # fmt: skip


def stream(folder: Path, size: int) -> dict[str, Any]:
    return trained(
        folder / "stream", mlp(), Stream(7), num_train_epochs=2, loss_fn=own_loss,
        gradient_accumulation_steps=2 // size, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip


def one_batch(folder: Path, size: int) -> dict[str, Any]:
    return trained(folder / "one", mlp(), examples(4), eval_data=examples(4), max_steps=3)


ALIKE = {"dataset": dataset, "loader": loader, "stream": stream, "one batch": one_batch}
"""Trainings of one process or of several, which take the same steps."""


def of_ranks(folder: Path) -> dict[str, Any]:
    """Trainings that only several processes can do."""
    rank = dist.get_rank()
    got: dict[str, Any] = {}
    noisy = [nn.BatchNorm1d(16), nn.Dropout(0.3)]
    options: dict[str, Any] = {"max_steps": 8, "save_steps": 3, "run_name": "noisy"}
    got["whole"] = trained(folder / "whole", mlp(*noisy), examples(50), **options)
    left = folder / "whole" / "noisy" / "checkpoints" / "step-3"
    again = {**options, "run_name": "again", "resume_from_checkpoint": str(left)}
    noisy = [nn.BatchNorm1d(16), nn.Dropout(0.3)]
    got["resumed"] = trained(folder / "again", mlp(*noisy), examples(50), **again)

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.used(inputs)
            return out

    seen: list[float] = []
    evaluated: list[float] = []

    def drawing_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Draws other numbers in each process than in the other."""
        torch.rand(1 + rank)
        (seen if torch.is_grad_enabled() else evaluated).extend(batch[0][:, 0].tolist())
        return own_loss(model, batch)

    generators = {"seen": None, "seen by generator": torch.Generator().manual_seed(rank)}
    for name, generator in generators.items():
        seen.clear()
        evaluated.clear()
        shuffled, for_eval = (
            DataLoader(examples(48), batch_size=4, shuffle=True, generator=generator)
            for _ in range(2)
        )
        trained(
            folder / name, mlp(), shuffled, eval_data=for_eval, eval_steps=6,
            num_train_epochs=2, loss_fn=drawing_loss,
        )  # fmt: skip
        got[name] = {"train": [*seen], "eval": [*evaluated]}

    wrapped = DistributedDataParallel(Partly(), find_unused_parameters=True)
    own = DistributedSampler(examples(48), shuffle=False)
    got["wrapped"] = trained(
        folder / "wrapped", wrapped, DataLoader(examples(48), batch_size=4, sampler=own),
        num_train_epochs=2,
    )  # fmt: skip
    model = mlp()
    wrong: dict[str, tuple[nn.Module, Any]] = {
        "sharded": (fully_shard(mlp()), own_loss),
        "not called": (model, lambda _, batch: own_loss(model, batch)),
    }
    for name, (given, loss_fn) in wrong.items():
        try:
            trained(folder / name, given, examples(50), max_steps=2, loss_fn=loss_fn)
        except ValueError as error:
            got[name] = str(error)
    return got


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(rank)  # models that begin apart: rank 0's is that of all
    got = {}
    for name, training in ALIKE.items():  # the first makes the group, and the others find it
        torch.manual_seed(rank)
        got[name] = training(folder, size)
    got |= of_ranks(folder)
    torch.save(got, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
