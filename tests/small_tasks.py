"""Small real tasks: digits for classifiers, the standard library's text for a tiny GPT."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvizllm.models.gpt import GPT, GPTConfig
from pyvizllm.ops import CrossEntropyMetrics, cross_entropy
from pyvizllm.training.text import VOCAB_SIZE, TextDataset

Batch = tuple[Tensor, Tensor, list[int]]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits: [N, 64] in 0..1, and classes [N]."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def digit_batches(
    steps: int, batch_size: int = 32, *, seed: int = 0, examples: int = 1400, shuffle: bool = True
) -> Iterator[Batch]:
    """Epochs over the first `examples` digits, shuffled anew each time, with their numbers."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        order = torch.arange(examples)
        if shuffle:
            order = torch.randperm(examples, generator=generator)
        for chosen in order[: examples // batch_size * batch_size].split(batch_size):
            if done == steps:
                return
            yield images[chosen], labels[chosen], chosen.tolist()
            done += 1


def mlp(
    *widths: int,
    seed: int = 0,
    activation: type[nn.Module] = nn.ReLU,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A perceptron of these widths, 64 ... 10, with dropout after each activation."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def class_loss(model: nn.Module, batch: Any) -> tuple[Tensor, CrossEntropyMetrics]:
    """Our cross-entropy, with its metrics."""
    logits = model(batch[0])
    if logits.dim() == 3:
        logits = logits.flatten(0, 1)
    loss, metrics = cross_entropy(logits.float(), batch[1].flatten(), return_metrics=True)
    return loss, metrics


def plain_loss(model: nn.Module, batch: Any) -> Tensor:
    """torch's cross-entropy, without metrics."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


@functools.cache
def text(block_size: int) -> TextDataset:
    return TextDataset(block_size=block_size, split="train")


def text_batches(
    steps: int, batch_size: int = 8, *, block_size: int = 32, seed: int = 0
) -> Iterator[Batch]:
    """Windows of the standard library, drawn without replacement."""
    data = text(block_size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    for step in range(steps):
        chosen = order[step * batch_size : (step + 1) * batch_size].tolist()
        inputs, targets = zip(*(data[index] for index in chosen), strict=True)
        yield torch.stack(inputs), torch.stack(targets), chosen


def tiny_gpt(*, seed: int = 0, n_layer: int = 4, dropout: float = 0.0) -> GPT:
    """Four blocks of width 32: 69 thousand parameters."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(VOCAB_SIZE, 32, n_layer, 2, 32, dropout))


def evaluation(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], float]:
    """A function that evaluates the model as it is when it is called."""

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            loss = class_loss(model, (inputs, targets))[0].item()
        model.train()
        return loss

    return evaluate
