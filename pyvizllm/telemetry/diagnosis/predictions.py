"""What is wrong with labels and predictions, seen in the metrics of the loss."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.classes import (
    CORRECT,
    ENTROPY,
    LOSS,
    TOKENS,
    Classes,
    token_sums,
)
from pyvizllm.telemetry.diagnosis.losses import noise
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom

WINDOW = 64
LEAST = 256  # steps before a loss that stands still means anything
BLIND = 512  # steps instead, where updates are not measured


def _has_tried(run: Run, travelled: float) -> bool:
    """Whether the optimizer has had its chance: the weights have gone so many of their lengths.

    LSTMs and deep networks stand at chance for hundreds of steps and learn yet; at a small learning
    rate, anything does.
    """
    if run.losses.count < LEAST or run.warming_up(WINDOW):
        return False
    if run.ratios.latest is None:
        return run.losses.count >= BLIND
    return run.ratios.travelled >= travelled


class LossAtChance:
    """The loss stays at log(classes), the loss of a uniform guess, while the weights travel far.

    Labels that have nothing to do with the inputs (shuffled apart, shifted, the wrong column) teach
    a model nothing but their frequencies until it learns them by heart (Zhang et al., 2017, train
    on such labels). Without metrics of the loss, a loss that looks like a cross-entropy is taken
    for one, and it is a warning.
    """

    name: ClassVar[str] = "loss_at_chance"
    lasting: ClassVar[bool] = True
    NEAR = 0.02  # of log(classes)
    TRAVELLED = 1.0

    def __init__(self) -> None:
        self._classes = Classes()

    def look(self, run: Run) -> Symptom | None:
        classes, how = self._classes.find(run)
        table = token_sums(run, WINDOW)
        known = len(table) > 0
        if classes < 2 or 0 < len(table) < WINDOW or not _has_tried(run, self.TRAVELLED):
            return None
        chance = float(np.log(classes))
        tokens, correct, total, _ = table.sum(0)
        loss = total / tokens if known else run.losses.level
        never_lower = run.losses.best >= (1 - self.NEAR) * chance
        if not (never_lower and abs(loss - chance) <= self.NEAR * chance):
            return None
        accuracy = {"accuracy": correct / tokens} if known else {}
        if known and accuracy["accuracy"] > 1 / classes + 0.1:
            return None
        said = f"; accuracy {100 * accuracy['accuracy']:.1f} %" if known else ""
        return Symptom(
            "serious" if known or run.options.classes is not None else "warning",
            f"after {run.losses.count} steps the loss is {loss:.4g}, that of a uniform guess, "
            f"log({classes}) = {chance:.4g}{said} (number of classes: {how})",
            "Check that inputs and labels belong together (shuffled apart, shifted by one, wrong "
            "column), that ignore_index is not a real class, and that gradients reach the model.",
            {"loss": loss, "chance": chance, "classes": float(classes), **accuracy},
        )


class ConstantPredictions:
    """The predictions are as sure as each other on every batch, whose losses differ: a constant.

    From step to step the mean entropy of a model that reads its inputs varies about as much as its
    loss; a model that gives each input the same distribution has an entropy that moves only with
    the weights. Below 2 % of the loss's variation, with a loss that stands still, it ignores what
    it is given. A language model does so for a while, until it knows more than the frequencies of
    its tokens: it is a note until the weights have gone five times their length.
    """

    name: ClassVar[str] = "constant_predictions"
    lasting: ClassVar[bool] = True
    SHARE = 0.02
    TRAVELLED, WARNING = 0.5, 5.0

    def look(self, run: Run) -> Symptom | None:
        if not _has_tried(run, self.TRAVELLED):
            return None
        table = token_sums(run, LEAST)
        if len(table) < LEAST:
            return None
        means = table / table[:, :1]
        of_loss, of_entropy = noise(means[:, LOSS]), noise(means[:, ENTROPY])
        level = float(means[:, LOSS].mean())
        # A loss that has not moved is that of uniform predictions: for `loss_at_chance`.
        if abs(level - run.losses.initial) <= 0.02 * abs(run.losses.initial):
            return None
        # Equal losses (one batch again and again) show nothing.
        if not (of_loss > 1e-3 * level and of_entropy < self.SHARE * of_loss):
            return None
        half = LEAST // 2
        fall = float(means[:half, LOSS].mean() - means[half:, LOSS].mean())
        if fall > 2 * of_loss * (2 / half) ** 0.5:
            return None
        accuracy = float(table[:, CORRECT].sum() / table[:, TOKENS].sum())
        return Symptom(
            "warning" if run.ratios.travelled >= self.WARNING else "info",
            f"the model predicts the same for every input: from step to step the entropy of its "
            f"predictions varies by {of_entropy:.1e} and the loss by {of_loss:.1e}; the loss stays "
            f"at {level:.4g}, the accuracy at {100 * accuracy:.1f} %",
            "Check that the inputs reach the model (normalised, not all zero), that its hidden "
            "units are not dead, and that labels belong to the inputs.",
            {"entropy_noise": of_entropy, "loss_noise": of_loss, "accuracy": accuracy},
        )


class EntropyCollapse:
    """The model is sure and wrong: the entropy of its predictions is below a tenth of their loss.

    A calibrated model's loss equals its entropy in the mean (the expected log-loss of a
    forecast that is right about its own chances). The loss has to matter, too: at
    least a tenth of what it was at the start.
    """

    name: ClassVar[str] = "entropy_collapse"
    lasting: ClassVar[bool] = True
    SHARE = 0.1
    WINDOW = 32

    def look(self, run: Run) -> Symptom | None:
        table = token_sums(run, self.WINDOW)
        if len(table) < self.WINDOW:
            return None
        tokens, correct, total, entropy = table.sum(0)
        loss, entropy, accuracy = total / tokens, entropy / tokens, correct / tokens
        if not (loss > 0.1 * run.losses.initial and entropy < self.SHARE * loss):
            return None
        return Symptom(
            "serious",
            f"the predictions have collapsed: their entropy is {entropy:.3g} nats at a loss of "
            f"{loss:.4g} and an accuracy of {100 * accuracy:.0f} % (means of {self.WINDOW} steps)",
            "Lower the learning rate; label smoothing, z-loss or an entropy bonus keep the logits "
            "small.",
            {"entropy": entropy, "loss": loss, "accuracy": accuracy},
            score=loss / max(entropy, 1e-12),
        )


class IgnoredTargets:
    """Hardly a target counts: less than one in twenty, or none in one of ten steps.

    Known where the micro-batches' sizes (examples) exceed the tokens that the metrics count, and
    where a step has no counted token at all.
    """

    name: ClassVar[str] = "ignored_targets"
    lasting: ClassVar[bool] = True
    SHARE = 0.05
    EMPTY = 0.1
    WINDOW = 32

    def look(self, run: Run) -> Symptom | None:
        tokens = run.history.metrics(self.WINDOW)[:, TOKENS]
        tokens = tokens[~np.isnan(tokens)]
        if len(tokens) < self.WINDOW:
            return None
        empty = float((tokens == 0).mean())
        share = self._counted(run)
        if empty <= self.EMPTY and not share < self.SHARE:
            return None
        said = (
            f"{100 * empty:.0f} % of the last {self.WINDOW} steps had no target that counts"
            if empty > self.EMPTY
            else f"only {100 * share:.2g} % of the targets count; the others are ignore_index"
        )
        return Symptom(
            "serious" if empty > 0.5 else "warning",
            said,
            "Check ignore_index, the mask of the prompt and the truncation of long examples: what "
            "is ignored teaches nothing.",
            {"steps_without_targets": empty, "counted": share},
            score=1 + empty,
        )

    @staticmethod
    def _counted(run: Run) -> float:
        """Counted tokens per example of the newest steps; NaN where sizes are unknown."""
        steps = run.new
        if steps.metrics is None or steps.micro_batches is None:
            return float("nan")
        sizes = steps.micro_batches.sizes
        if (sizes[steps.micro_batches.seen] < 0).any() or not sizes.any():
            return float("nan")
        return float(steps.metrics[:, TOKENS].sum() / np.maximum(sizes, 0).sum())
