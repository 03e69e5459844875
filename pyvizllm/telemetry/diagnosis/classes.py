"""How many classes a loss chooses from, seen in the first predictions or in the first losses."""

from __future__ import annotations

import numpy as np

from pyvizllm.telemetry.diagnosis.rule import Run, is_table
from pyvizllm.telemetry.records import Floats

TOKENS, CORRECT, LOSS, ENTROPY = 0, 1, 2, 3  # columns of CrossEntropyMetrics.sums
UNIFORM = 0.15  # nats between the first predictions' entropy and log(classes)
NEAR = 0.02  # of log(classes): the first losses' distance from it


def token_sums(run: Run, last: int) -> Floats:
    """[n, 4]: tokens, correct, loss, entropy, summed over each step's tokens; only full rows."""
    sums = run.history.metrics(last)[:, :4]
    if np.isnan(sums).all():  # a history file has means
        tags = ("train/accuracy", "train/loss", "train/entropy")
        means = [run.history.scalar(tag, last) for tag in tags]
        sums = np.stack([np.ones_like(means[0]), *means], axis=1)
    return sums[np.isfinite(sums).all(1) & (sums[:, TOKENS] > 0)]


class Classes:
    """Infers the number of classes where it is not given.

    An untrained model's predictions are nearly uniform: exp(their entropy) is near the number of
    classes, and some parameter has that dimension. Where only losses are known, the first of them
    is near log(classes), and classes are the rows of the last matrix or of a table, which may be
    tied to it.
    """

    def __init__(self) -> None:
        self._first: list[Floats] = []

    def find(self, run: Run) -> tuple[int, str]:
        """The number and where it comes from; 0 where it is not known. Called for every `run`."""
        rows = token_sums(run, min(len(run.new), len(run.history)))
        if len(self._first) < 3:
            self._first += list(rows[: 3 - len(self._first)])
        if run.options.classes is not None:
            return run.options.classes, "as given"
        return self._of_entropy(run) if self._first else _of_losses(run)

    def _of_entropy(self, run: Run) -> tuple[int, str]:
        first = np.stack(self._first).sum(0)
        entropy = float(first[ENTROPY] / first[TOKENS])
        sizes = {size for info in run.options.parameters.values() for size in info.shape}
        if not sizes:
            return round(float(np.exp(entropy))), "about, from the entropy of the first predictions"
        nearest = min(sizes, key=lambda size: abs(np.log(max(size, 1)) - entropy))
        if abs(np.log(max(nearest, 1)) - entropy) > UNIFORM:
            return 0, ""
        return nearest, "a dimension of the parameters, by the entropy of the first predictions"


def _of_losses(run: Run) -> tuple[int, str]:
    known = run.options.parameters
    matrices = [name for name, info in known.items() if len(info.shape) >= 2]
    for name in dict.fromkeys((*matrices[-1:], *filter(is_table, matrices))):
        classes = known[name].shape[0]
        # Of one or two, log(2) is the loss of a pair of networks against each other, too.
        if classes > 2 and abs(run.losses.initial - np.log(classes)) <= NEAR * np.log(classes):
            return classes, f"the rows of {name}, if the loss is a cross-entropy"
    return 0, ""
