"""The order of the data: deterministic, complete, and the same when taken up in the middle."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyvizllm.training.data import make_source, windows
from pyvizllm.training.random_numbers import random_state, restore_random_state, seed_everything


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count), torch.arange(count))


def source(data: Any, *, seed: int = 1, shuffle: bool = True, workers: int = 0) -> Any:
    return make_source(data, batch_size=3, seed=seed, shuffle=shuffle, workers=workers)


def values(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


def test_every_epoch_is_another_permutation() -> None:
    data = source(numbers(10))
    epochs = [list(itertools.chain(*values(data.epoch(epoch, 0)))) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    again = source(numbers(10))
    assert [list(itertools.chain(*values(again.epoch(e, 0)))) for e in range(3)] == epochs
    other = list(itertools.chain(*values(source(numbers(10), seed=2).epoch(0, 0))))
    assert other != epochs[0]


def test_last_batch_may_be_smaller_and_evaluation_keeps_the_order() -> None:
    data = source(numbers(7), shuffle=False)
    assert data.length == 3
    assert values(data.epoch(0, 0)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_order_takes_nothing_from_the_global_random_numbers() -> None:
    seed_everything(5)
    expected = torch.rand(1)
    seed_everything(5)
    list(source(numbers(10)).epoch(0, 0))
    assert torch.equal(torch.rand(1), expected)


def test_windows_end_with_the_epoch() -> None:
    # 5 batches in windows of 2: two full ones and one of a single batch, in each epoch.
    stream = windows(source(numbers(13)), 2, epochs=2)
    found = [(len(window.batches), window.epoch, window.consumed) for window in stream]
    epoch = [(2, 2), (2, 4), (1, 5)]
    assert found == [(size, number, end) for number in (0, 1) for size, end in epoch]


class Noisy(Dataset[Any]):
    """Examples with random augmentation from all three libraries."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        return index + noise, index


def iterable(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=3, shuffle=True)


def own_generator(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("make", [lambda data: data, iterable, own_generator])
@pytest.mark.parametrize("done", [1, 3, 4])  # inside epoch 0, at its end, inside epoch 1
def test_resume_brings_the_same_batches(make: Any, done: int) -> None:
    seed_everything(3)
    stream = windows(source(make(Noisy())), 2, epochs=3)
    for _ in range(done):
        window = next(stream)
        torch.rand(5)  # the training's own use of the random numbers
    position = {
        "epoch": window.epoch,
        "consumed": window.consumed,
        "epoch_state": window.epoch_state,
    }
    state = random_state()
    rest = [[batch[0] for batch in window.batches] for window in stream]
    seed_everything(99)
    restore_random_state(state)
    resumed = windows(source(make(Noisy())), 2, epochs=3, resume=position)
    again = [[batch[0] for batch in window.batches] for window in resumed]
    assert len(again) == 9 - done
    torch.testing.assert_close(again, rest, rtol=0, atol=0)


def test_worker_batches_do_not_depend_on_the_worker() -> None:
    whole = values(source(Noisy(), workers=2).epoch(1, 0))
    rest = values(source(Noisy(), workers=1).epoch(1, 2))
    assert rest == whole[2:]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.tensor(float(i)), i) for i in range(7)])


def test_iterable_dataset_gives_examples_and_any_iterable_gives_batches() -> None:
    assert values(source(Stream()).epoch(0, 0)) == [[0, 1, 2], [3, 4, 5], [6]]
    batches = [(torch.tensor([1]), torch.tensor([1])), (torch.tensor([2]), torch.tensor([2]))]
    assert values(source(batches).epoch(0, 0)) == [[1], [2]]
    assert source(batches).length == 2
    assert source(batch for batch in batches).length is None


def test_used_up_iterator_ends_the_windows() -> None:
    stream = windows(source(iter([1, 2, 3])), 2)
    assert [window.batches for window in stream] == [[1, 2], [3]]


@pytest.mark.parametrize("data", [numbers(0), []])
def test_empty(data: Any) -> None:
    with pytest.raises(ValueError, match="at least one example, got an empty dataset"):
        source(data)


@pytest.mark.parametrize("data", [3, "path/to/data.txt", torch.zeros(3)])
def test_no_data_at_all(data: Any) -> None:
    with pytest.raises(TypeError, match=f"expected data to be .* got {type(data).__name__}"):
        source(data)
