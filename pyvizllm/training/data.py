"""Batches in a fixed order that can be taken up again at any position.

A position is (epoch, batches consumed in it). For a map-style dataset we make the order
ourselves, from the seed and the epoch alone, so a resumed run starts at its position without
reading what went before. Anything else that can be iterated is repeated from the state that the
random numbers had at the start of the epoch, and the consumed batches are skipped.

Processes that train together take the batches of an epoch in turn.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from pyvizllm.training.distributed import ALONE, Processes
from pyvizllm.training.random_numbers import random_state, restore_random_state, seed_everything

__all__ = ["ELSEWHERE", "Source", "Window", "begin_alike", "make_source", "windows"]


ELSEWHERE = object()
"""Stands for a batch that another process takes."""


class Source(Protocol):
    """Batches, epoch by epoch."""

    length: int | None  # batches in an epoch, where that is known
    identity: dict[str, int | None]  # what must be the same for a position to mean the same
    processes: Processes  # that share its batches; only this one where each has its own

    def epoch(self, epoch: int, skip: int) -> Iterator[Any]:
        """The batches of epoch number `epoch` (0-based); the first `skip` are already gone.

        Those of other processes are ELSEWHERE. What comes first is rank 0's.
        """

    def borrowed(self, number: int) -> Any:
        """Batch `number`, just gone by, of the last epoch begun, whosever it was."""

    def sample_ids(self, epoch: int, number: int) -> list[int] | None:
        """What the examples of batch `number` of an epoch are called, where that is known."""

    def state(self) -> list[Tensor]:
        """States of the source's own random generators."""

    def restore(self, state: list[Tensor]) -> None:
        """Bring the source's own random generators back to `state`."""


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, and where the data stands after them."""

    batches: list[Any]  # of this process: at least one
    epoch: int
    consumed: int  # batches of this epoch, up to and with this window
    epoch_state: dict[str, Any]  # the random numbers' state when the epoch began
    sample_ids: list[list[int] | None]  # of each batch: indices of a dataset
    borrowed: bool = False  # the batch is another process's, and counts for nothing here


def windows(
    source: Source,
    size: int,
    processes: Processes = ALONE,
    *,
    epochs: float = float("inf"),
    resume: dict[str, Any] | None = None,
) -> Iterator[Window]:
    """Windows of `size` micro-batches of each process without end, or until `epochs` have passed.

    No window reaches over the end of an epoch: the last one may be shorter. Ends early when an
    epoch brings no batch at all (an iterator that is used up). `resume` is
    {"epoch", "consumed", "epoch_state"} of the last window trained on; the random numbers' state
    at the first call to next() is kept while the consumed batches are skipped.
    """
    epoch, consumed = (resume["epoch"], resume["consumed"]) if resume else (0, 0)
    of_all = size * source.processes.size
    while epoch < epochs:
        if resume is None:
            begin_alike(source, processes)
            epoch_state = {**random_state(), "source": source.state()}
            batches = source.epoch(epoch, 0)
        else:
            now, epoch_state = random_state(), resume["epoch_state"]
            restore_random_state(epoch_state)
            source.restore(epoch_state["source"])
            batches = source.epoch(epoch, consumed)
            restore_random_state(now)
            resume = None
        group = list(itertools.islice(batches, of_all))
        if not group and consumed == 0:
            return
        while group:
            own = [n for n, batch in enumerate(group) if batch is not ELSEWHERE]
            mine = [group[n] for n in own] or [source.borrowed(consumed)]
            ids = [source.sample_ids(epoch, consumed + n) for n in own] or [None]
            consumed += len(group)
            yield Window(mine, epoch, consumed, epoch_state, ids, borrowed=not own)
            group = list(itertools.islice(batches, of_all))
        epoch, consumed = epoch + 1, 0


def begin_alike(source: Source, processes: Processes) -> None:
    """Rank 0's random numbers for all: data that they share has to be shuffled alike in all."""
    if processes.size == 1:
        return
    numbers, of_source = processes.of_first((random_state(), source.state()))
    restore_random_state(numbers)
    if source.processes.size > 1:
        source.restore(of_source)


def make_source(
    data: Any,
    processes: Processes = ALONE,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    workers: int,
    pin_memory: bool = False,
) -> Source:
    """The batches of `data`: a map-style dataset, a DataLoader, or an iterable of batches.

    Lists and tuples are taken as batches; anything else with a length and an index as a dataset.
    Of several processes each reads the same, and takes its share; but a DataLoader with a
    DistributedSampler brings each what is its own.

    Raises:
        ValueError: empty data. TypeError: data that is none of these.
    """
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size, num_workers=workers)
    if isinstance(data, Mapping):  # it has a length and an index, but its keys are no positions
        raise TypeError(
            "train: expected data to be a dataset, a DataLoader or an iterable of batches, "
            f"got {type(data).__name__} (a list of one such batch is one)"
        )
    indexable = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    iterable = isinstance(data, Iterable) and not isinstance(data, (str, bytes, Tensor))
    if not iterable and (not indexable or isinstance(data, (str, bytes, Tensor))):
        raise TypeError(
            "train: expected data to be a dataset, a DataLoader or an iterable of batches, "
            f"got {type(data).__name__}"
        )
    if _length(data) == 0:
        raise ValueError("train: expected data with at least one example, got an empty dataset")
    if indexable and not isinstance(data, (list, tuple)):
        return _DatasetSource(data, processes, batch_size, seed, shuffle, workers, pin_memory)
    shared = not isinstance(getattr(data, "sampler", None), DistributedSampler)
    return _IterableSource(data, processes if shared else ALONE)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # an IterableDataset or a generator has no length
        return None


class _DatasetSource:
    """Our own order over a map-style dataset: a permutation for each (seed, epoch)."""

    def __init__(
        self,
        dataset: Dataset[Any],
        processes: Processes,
        batch_size: int,
        seed: int,
        shuffle: bool,
        workers: int,
        pin_memory: bool,
    ) -> None:
        self.processes = processes
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.workers, self.pin_memory = shuffle, workers, pin_memory
        self.examples = len(dataset)  # type: ignore[arg-type]
        self.length: int | None = -(-self.examples // batch_size)
        self.identity: dict[str, int | None] = {
            "examples": self.examples,
            "batch size": batch_size,
            "seed": seed,
        }

    def epoch(self, epoch: int, skip: int) -> Iterator[Any]:
        order = np.arange(self.examples)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
        self._batches = _EpochBatches(self.dataset, order, self.batch_size, (self.seed, epoch))
        numbers = range(skip, len(self._batches))
        loader = DataLoader(
            self._batches,
            batch_size=None,  # an item is a whole batch
            sampler=numbers[self.processes.rank :: self.processes.size],
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            # Its own generator: otherwise each epoch would draw from the training's numbers.
            generator=torch.Generator(),
        )
        if self.processes.size == 1:
            return iter(loader)
        return _in_turn(iter(loader), len(numbers), self.processes)

    def borrowed(self, number: int) -> Any:
        return self._batches[number]

    def sample_ids(self, epoch: int, number: int) -> list[int] | None:
        # Windows ask while they go through the epoch, so the order is that of the last one begun.
        return self._batches.indices(number).tolist()

    def state(self) -> list[Tensor]:
        return []

    def restore(self, state: list[Tensor]) -> None:
        pass  # the order depends on the seed and the epoch only


class _EpochBatches(Dataset[Any]):
    """The batches of one epoch as a map-style dataset: item number i is batch number i."""

    def __init__(
        self, dataset: Dataset[Any], order: np.ndarray, batch_size: int, seed: tuple[int, int]
    ) -> None:
        self.dataset, self.order, self.batch_size, self.seed = dataset, order, batch_size, seed

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> Any:
        if get_worker_info() is not None:
            # Which worker makes a batch, and after which others, differs in a resumed run:
            # random augmentation must depend on the batch alone.
            seed_everything(int(np.random.SeedSequence((*self.seed, number)).generate_state(1)[0]))
        return default_collate([self.dataset[int(index)] for index in self.indices(number)])

    def indices(self, number: int) -> np.ndarray:
        return self.order[number * self.batch_size : (number + 1) * self.batch_size]


def _in_turn(own: Iterator[Any], count: int, processes: Processes) -> Iterator[Any]:
    """`count` batches of all processes, of which the own ones are there."""
    for number in range(count):
        yield next(own) if number % processes.size == processes.rank else ELSEWHERE


class _IterableSource:
    """A DataLoader or any iterable of batches, in the order that it has itself."""

    def __init__(self, data: Iterable[Any], processes: Processes) -> None:
        self.data, self.processes = data, processes
        self._last: Any = None
        self.length = _length(data)
        self.identity = {"batches": self.length}

    def epoch(self, epoch: int, skip: int) -> Iterator[Any]:
        set_epoch = getattr(getattr(self.data, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        batches = iter(self.data)
        for _ in itertools.islice(batches, skip):
            pass
        return batches if self.processes.size == 1 else self._in_turn(batches)

    def _in_turn(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            self._last = batch
            yield batch if number % self.processes.size == self.processes.rank else ELSEWHERE

    def borrowed(self, number: int) -> Any:
        return self._last

    def sample_ids(self, epoch: int, number: int) -> list[int] | None:
        return None

    def state(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def restore(self, state: list[Tensor]) -> None:
        for generator, saved in zip(self._generators(), state, strict=True):
            generator.set_state(saved)

    def _generators(self) -> list[torch.Generator]:
        sampler = getattr(self.data, "sampler", None)
        found = [getattr(self.data, "generator", None), getattr(sampler, "generator", None)]
        return [generator for generator in found if isinstance(generator, torch.Generator)]
