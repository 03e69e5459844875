"""The metrics that cross_entropy takes from the same read of the logits as the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

CALIBRATION_BINS = 15
RECORD_SIZE = 7  # numbers of one token's record


@dataclass(frozen=True)
class CrossEntropyMetrics:
    """Sums over the tokens that count (target is not `ignore_index`), on the logits' device.

    `a + b` is the metrics of both batches together, so token-weighted means over micro-batches,
    steps or ranks come from adding first. Every property is a tensor on the device; none waits.
    """

    SIZE: ClassVar[int] = 8 + 3 * CALIBRATION_BINS

    sums: Tensor
    """[53] float64: tokens, correct, negative log-likelihood, entropy, log-sum-exp, top
    probability, correct among five, margin; then per calibration bin the tokens, the correct ones,
    the top probabilities."""

    def __add__(self, other: CrossEntropyMetrics) -> CrossEntropyMetrics:
        return CrossEntropyMetrics(self.sums + other.sums)

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
    def calibration(self) -> Tensor:
        """[3, 15] float64: tokens, correct, summed top probability per bin (i/15, (i+1)/15]."""
        return self.sums[8:].view(3, CALIBRATION_BINS)

    @property
    def expected_calibration_error(self) -> Tensor:
        """[] float64: mean |accuracy - confidence| over 15 bins (Guo et al., 2017, eq. 3)."""
        _, correct, confidence = self.calibration
        return (correct - confidence).abs().sum() / self.tokens
