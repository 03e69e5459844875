"""What a batch weighs, and how batches of any form reach the device."""

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from pyvizllm.training.config import TrainConfig
from pyvizllm.training.objective import CrossEntropyObjective, UserObjective, to_device

META = torch.device("meta")  # a device that every machine has
Pair = namedtuple("Pair", ["inputs", "targets"])


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like a tokenizer's batch: a mapping that is no dict, with its own `to`."""

    def to(self, device: torch.device) -> "Encoding":
        return Encoding({key: value.to(device) for key, value in self.items()})


def test_every_form_of_batch_moves_and_keeps_its_form() -> None:
    tensor = torch.zeros(2)
    moved = to_device({"a": [tensor, 3], "b": (tensor, "text"), "c": Pair(tensor, tensor)}, META)
    assert (type(moved["a"]), type(moved["b"]), type(moved["c"])) == (list, tuple, Pair)
    tensors = [moved["a"][0], moved["b"][0], moved["c"].inputs, moved["c"].targets]
    assert all(found.device == META for found in tensors)
    assert (moved["a"][1], moved["b"][1]) == (3, "text")
    encoding = to_device(Encoding(x=tensor), META)
    assert isinstance(encoding, Encoding)
    assert encoding["x"].device == META


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.zeros(3, 2), torch.tensor([1, -1, 2])), 2),
        ({"x": torch.zeros(3, 2), "labels": torch.tensor([[1, -1], [-1, -1]])}, 1),
        (Encoding(labels=torch.tensor([0, 1, 2, -1])), 3),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), 3),  # targets of floating point: the examples
        ({"a": "text", "b": [torch.zeros(5, 1)]}, 5),
        (torch.zeros(4), 4),
        ("nothing to count", 1),
    ],
)
def test_weight_of_a_batch(batch: Any, count: int) -> None:
    objective = UserObjective(lambda model, batch: torch.zeros(()), TrainConfig(ignore_index=-1))
    assert objective.count(batch).item() == count


def test_half_precision_losses_do_not_overflow() -> None:
    # 7 * 20,000 is above the largest float16, 65,504.
    targets = torch.zeros(20_000, dtype=torch.int64)
    objective = UserObjective(lambda m, b: torch.tensor(7.0, dtype=torch.float16), TrainConfig())
    total, metrics = objective(nn.Identity(), targets, objective.count((targets, targets)))
    assert (total.item(), total.dtype, metrics) == (140_000.0, torch.float32, None)


def test_as_many_positions_as_classes_reads_the_last_dimension_as_classes() -> None:
    logits, targets = torch.randn(2, 5, 5), torch.randint(5, (2, 5))
    objective = CrossEntropyObjective(TrainConfig(label_smoothing_factor=0.1))
    total, metrics = objective(nn.Identity(), (logits, targets), torch.tensor(10))
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(total, expected)
    assert metrics is not None
    assert metrics.tokens.item() == 10
