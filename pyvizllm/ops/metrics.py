"""The metrics that cross_entropy takes from the same read of the logits as the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

CALIBRATION_BINS = 15
RECORD_SIZE = 7  # numbers of one token's record


def wanted_of(return_metrics: bool | str) -> int:
    """As the operators have it: 0 the loss, 1 also the metrics, 2 also those of each token."""
    return 2 if return_metrics == "per_token" else int(return_metrics)


@dataclass(frozen=True, eq=False)
class PerToken:
    """Three numbers of each token, of the target's shape (of probabilities, without classes)."""

    loss: Tensor
    """float64: negative log-likelihood, nats, without class weights, label smoothing and z-loss
    (with probabilities the expected one); NaN for ignored tokens."""
    entropy: Tensor
    """float64: entropy of the predicted distribution, nats; NaN for ignored tokens."""
    rank: Tensor
    """int64: how many logits are larger than the target's, or equal and before it: 0 where the
    prediction is correct; -1 for ignored tokens, and where a logit is NaN or +Inf."""


@dataclass(frozen=True, eq=False)
class CrossEntropyMetrics:
    """Sums over the tokens that count (target is not `ignore_index`), on the logits' device.

    Logits here are those after `logit_scale` and `softcap`; with probabilities, the target is the
    most probable class (the first). `a + b` is the metrics of both batches together, as is
    `sum(batches)`, so token-weighted means over micro-batches, steps or ranks come from adding
    first; it has no `per_token`. Every property is a tensor on the device; none waits.
    """

    SIZE: ClassVar[int] = 8 + 3 * CALIBRATION_BINS

    sums: Tensor
    """[53] float64: tokens, correct, negative log-likelihood, entropy, log-sum-exp, top
    probability, correct among five, margin; then per calibration bin the tokens, the correct ones,
    the top probabilities."""
    per_token: PerToken | None = None
    """With `return_metrics="per_token"`."""

    def __repr__(self) -> str:
        """Names and shapes: numbers would have to wait for the device."""
        names = [n for n, value in vars(type(self)).items() if isinstance(value, property)]
        scalars = ", ".join(name for name in names if name != "calibration")
        shape = None if self.per_token is None else list(self.per_token.loss.shape)
        return (
            f"CrossEntropyMetrics({scalars}: [], calibration: {[3, CALIBRATION_BINS]}, "
            f"per_token: {shape}, device: {self.sums.device})"
        )

    def __add__(self, other: CrossEntropyMetrics) -> CrossEntropyMetrics:
        return CrossEntropyMetrics(self.sums + other.sums)

    def __radd__(self, zero: int) -> CrossEntropyMetrics:
        """Of `sum`, which begins with 0."""
        return self if zero == 0 else NotImplemented

    def _mean(self, index: int) -> Tensor:
        return self.sums[index] / self.sums[0]

    @property
    def tokens(self) -> Tensor:
        """[] float64: how many tokens count."""
        return self.sums[0]

    @property
    def correct(self) -> Tensor:
        """[] float64: tokens whose target is the argmax (the first, where logits are equal)."""
        return self.sums[1]

    @property
    def accuracy(self) -> Tensor:
        """[] float64: correct / tokens."""
        return self._mean(1)

    @property
    def loss(self) -> Tensor:
        """[] float64: mean negative log-likelihood, nats; no label smoothing, no z-loss."""
        return self._mean(2)

    @property
    def perplexity(self) -> Tensor:
        """[] float64: exp(loss)."""
        return self.loss.exp()

    @property
    def entropy(self) -> Tensor:
        """[] float64: mean entropy of the predicted distributions, nats."""
        return self._mean(3)

    @property
    def log_sum_exp(self) -> Tensor:
        """[] float64: mean log-sum-exp of the logits (what z-loss keeps near 0)."""
        return self._mean(4)

    @property
    def top_probability(self) -> Tensor:
        """[] float64: mean probability of the most probable class."""
        return self._mean(5)

    @property
    def top5_accuracy(self) -> Tensor:
        """[] float64: tokens whose target's logit is among the five largest / tokens."""
        return self._mean(6)

    @property
    def margin(self) -> Tensor:
        """[] float64: mean of the target's logit - the largest of the others; 0 for one class."""
        return self._mean(7)

    @property
    def calibration(self) -> Tensor:
        """[3, 15] float64: tokens, correct, summed top probability per bin (i/15, (i+1)/15]."""
        return self.sums[8:].view(3, CALIBRATION_BINS)

    @property
    def expected_calibration_error(self) -> Tensor:
        """[] float64: mean |accuracy - confidence| over 15 bins (Guo et al., 2017, eq. 3)."""
        _, correct, confidence = self.calibration
        return (correct - confidence).abs().sum() / self.tokens


@dataclass(frozen=True)
class TokenRecords:
    """What was noted of each token while its logits were read; NaN where it does not count.

    The rank is NaN where a logit is NaN or +Inf, too.
    """

    values: Tensor
    """[7, rows] float64: the largest logit, and of the distances d from it the sums of e^d, of
    d e^d, and of d (d q with probabilities q); the target's logit, its rank, the largest other."""

    def entropy(self) -> Tensor:
        """[rows] float64, nats."""
        return self.values[1].log() - self.values[2] / self.values[1]

    def loss(self, target: Tensor) -> Tensor:
        """[rows] float64: negative log-likelihood of class indices [rows], or, as an expectation,
        of probabilities [rows, classes]."""
        log_sum = self.values[1].log()
        if target.dim() == 2:
            return target.sum(1, dtype=torch.float64) * log_sum - self.values[3]
        return log_sum - (self.values[4] - self.values[0])

    def per_token(self, target: Tensor, shape: torch.Size) -> PerToken:
        """Each number in the shape of the targets."""
        rank = self.values[5].nan_to_num(-1).long()
        return PerToken(
            self.loss(target).reshape(shape), self.entropy().reshape(shape), rank.reshape(shape)
        )

    def sums(self, target: Tensor, counts: Tensor, classes: int) -> Tensor:
        """[53] float64: the sums of `CrossEntropyMetrics` over the rows that count [rows]."""
        top, sum_exp, _, _, of_target, rank, of_others = self.values
        confidence = (1 / sum_exp).where(sum_exp != 0, torch.nan)  # 0: of a row that is all -Inf
        correct = (rank == 0).double()
        margin = of_target - of_others if classes > 1 else torch.zeros_like(sum_exp)
        sums = (
            counts.double(),
            correct,
            self.loss(target),
            self.entropy(),
            top + sum_exp.log(),
            confidence,
            (rank < 5).double(),
            margin,
        )
        upper = torch.arange(1, CALIBRATION_BINS + 1, device=rank.device)
        in_bin = (confidence * CALIBRATION_BINS).ceil().unsqueeze(1) == upper  # NaN: in none
        bins = (counts.double(), correct, confidence)
        return torch.cat(
            [
                torch.stack([value.where(counts, 0).sum() for value in sums]),
                torch.stack([value.unsqueeze(1).where(in_bin, 0).sum(0) for value in bins]).view(
                    -1
                ),
            ]
        )
