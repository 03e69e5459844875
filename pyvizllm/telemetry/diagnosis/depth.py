"""Vanishing and exploding gradients: a geometric trend over depth, not small or large numbers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.rule import Run, Symptom
from pyvizllm.telemetry.records import Floats

WARNING, SERIOUS = 3.0, 5.0  # decades between the first and the last layer
STRAIGHT = 0.8  # correlation of log10(gradient) with depth


def trend(values: Floats) -> tuple[float, float]:
    """Of values [L] at depths 0..L-1: rise of the fitted line from end to end, and correlation."""
    depth = np.arange(len(values)) - (len(values) - 1) / 2
    centred = values - values.mean()
    slope = float(depth @ centred / (depth @ depth))
    spread = float(np.sqrt((depth @ depth) * (centred @ centred)))
    return slope * (len(values) - 1), float(depth @ centred) / spread if spread > 0 else 0.0


class _Trend:
    """A steady factor from layer to layer that adds up to three decades (five: serious).

    Bengio, Simard and Frasconi (1994) and Hochreiter (1991): gradients through many layers are
    products of Jacobians, so they shrink or grow geometrically. Glorot and Bengio (2010) show that
    trained networks keep them within about one decade over depth; beyond three, the layers at one
    end get a thousandth of the others' signal. The correlation tells such a trend from one layer
    that merely differs.
    """

    lasting: ClassVar[bool] = True
    sign: ClassVar[float]
    words: ClassVar[str]
    advice: ClassVar[str]

    def look(self, run: Run) -> Symptom | None:
        found = run.gradient_by_depth
        if found is None:
            return None
        layers, values = found
        rise, correlation = trend(values)
        decades = self.sign * rise
        if not (decades >= WARNING and self.sign * correlation >= STRAIGHT):
            return None
        factor = 10 ** (decades / (len(layers) - 1))
        return Symptom(
            "serious" if decades >= SERIOUS else "warning",
            f"gradients {self.words} with depth: from {layers[-1]} back to {layers[0]}, "
            f"{len(layers)} layers, by a factor of {10**decades:.1e}, about {factor:.3g} a layer "
            f"(root mean square {10 ** values[-1]:.1e} and {10 ** values[0]:.1e})",
            self.advice,
            {
                "decades": decades,
                "layers": float(len(layers)),
                "correlation": correlation,
                "first_layer_rms": 10 ** float(values[0]),
                "last_layer_rms": 10 ** float(values[-1]),
            },
            score=decades,
        )


class VanishingGradients(_Trend):
    """Gradients shrink from layer to layer: those near the input learn nothing."""

    name: ClassVar[str] = "vanishing_gradients"
    sign = 1.0
    words = "vanish"
    advice = (
        "Use residual connections or normalisation layers, ReLU or GELU instead of sigmoid or "
        "tanh, and an initialisation that keeps the variance (He, Glorot)."
    )


def vanishes(run: Run) -> bool:
    """Whether gradients shrink with depth, as that rule has it."""
    return VanishingGradients().look(run) is not None


class ExplodingGradients(_Trend):
    """Gradients grow from layer to layer: those near the input are thrown about."""

    name: ClassVar[str] = "exploding_gradients"
    sign = -1.0
    words = "explode"
    advice = (
        "Use a smaller initialisation (He, Glorot), normalisation layers or residual connections, "
        "and clip the gradients' norm meanwhile."
    )


class GrowingGradients:
    """The norm of all gradients grows a hundredfold over the run and stays there.

    A healthy norm falls, or rises by a small factor, after the first steps. The factor is that of
    Pascanu, Mikolov and Bengio (2013, section 3.2), who clip at up to ten times the usual norm,
    taken twice.
    """

    name: ClassVar[str] = "growing_gradients"
    lasting: ClassVar[bool] = True
    FACTOR = 100.0
    REFERENCE = 64  # steps
    RECENT = 16

    def __init__(self) -> None:
        self._first: list[float] = []

    def look(self, run: Run) -> Symptom | None:
        norms = run.history.total_norm("grad", max(len(run.new), self.RECENT))
        fresh = norms[-len(run.new) :]
        if len(self._first) < self.REFERENCE:
            wanted = self.REFERENCE - len(self._first)
            self._first += fresh[np.isfinite(fresh)][:wanted].tolist()
            return None
        norms = norms[np.isfinite(norms)][-self.RECENT :]
        usual = float(np.median(self._first))
        if len(norms) < self.RECENT or usual == 0:
            return None
        now = float(np.median(norms))
        if not now > self.FACTOR * usual or run.losses.improved:
            return None
        return Symptom(
            "serious",
            f"the gradients' norm has grown from {usual:.3g} in the first {self.REFERENCE} steps "
            f"to {now:.3g}, {now / usual:.3g} times as much, and the loss does not fall",
            "Lower the learning rate, clip the gradients' norm, or warm up for longer.",
            {"norm": now, "usual_norm": usual},
            score=now / usual,
        )
