"""Parameters that do not learn: dead, without a gradient, or left out of the step."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.columns import measured
from pyvizllm.telemetry.diagnosis.ratios import LEAST_UPDATES
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom, some
from pyvizllm.telemetry.records import Flags

_ADVICE = (
    "Add it to the optimizer (new modules need optimizer.add_param_group) with a learning rate "
    "above 0 and large enough for its precision, or set requires_grad=False if it is meant to be "
    "frozen."
)
WINDOW = 64
LEAST = 50  # measured steps before anything is said


class DeadParameters:
    """A gradient that is exactly zero, every element, for 50 steps, while others have one.

    Rounding makes a merely small gradient non-zero somewhere: exact zeros mean that the loss does
    not depend on the parameter where it stands, as behind ReLUs that are always off (Lu, Shin, Su
    and Karniadakis, 2019, "Dying ReLU").
    """

    name: ClassVar[str] = "dead_parameters"
    lasting: ClassVar[bool] = True

    def look(self, run: Run) -> Symptom | None:
        largest = run.history.statistic("grad", "abs_max", WINDOW)
        alive = (largest > 0).any(1)  # [n]: the step had some gradient
        largest = largest[alive]
        if len(largest) < LEAST:
            return None
        dead = (measured(largest) >= LEAST) & ~(largest > 0).any(0) & ~np.isnan(largest[-1])
        if not dead.any():
            return None
        share = float(dead.sum() / max(1, (measured(largest) >= LEAST).sum()))
        return Symptom(
            "serious" if share >= 0.5 else "warning",
            f"the gradient of {some(run.history.names, dead)} has been exactly zero for "
            f"{len(largest)} steps ({dead.sum()} of {dead.size} parameters)",
            "Look for ReLUs that never switch on (learning rate or initialisation too large), "
            "multiplication by zero, or an output that the loss does not use.",
            {"parameters": float(dead.sum()), "share": share, "steps": float(len(largest))},
            score=float(dead.sum()),
        )


class DeadUnits:
    """Most units of a layer have a bias gradient of exactly zero, at every one of 50 steps.

    A bias is added to each sample's unit, so its gradient is zero where the unit is off for the
    whole batch. The smallest share of the 50 steps bounds the units that are off for good; 90 %
    is beyond what sparse activations do (Glorot, Bordes and Bengio, 2011, find 50 to 80 %).
    """

    name: ClassVar[str] = "dead_units"
    lasting: ClassVar[bool] = True
    SHARE = 0.9
    UNITS = 8  # of a layer, at least: one of two is no statement

    def look(self, run: Run) -> Symptom | None:
        names, biases = run.history.names, run.columns.biases
        if not biases.any():
            return None
        zeros = run.history.statistic("grad", "zeros", WINDOW)[:, biases]
        numel = run.history.statistic("grad", "numel", WINDOW)[:, biases]
        enough = (measured(zeros) >= LEAST) & (np.nan_to_num(numel).max(0) >= self.UNITS)
        share = np.where(np.isnan(zeros), 1.0, zeros / numel).min(0)
        # All zero is a dead parameter, which the other rule reports.
        bad = enough & (share >= self.SHARE) & (share < 1.0)
        if not bad.any():
            return None
        chosen = np.zeros(len(names), np.bool_)
        chosen[np.flatnonzero(biases)[bad]] = True
        worst = float(share[bad].max())
        return Symptom(
            "warning",
            f"at least {100 * float(share[bad].min()):.0f} % of the units of "
            f"{some(names, chosen)} were off for the whole batch in every one of the last "
            f"{WINDOW} steps",
            "Lower the learning rate, use a leaky activation or GELU, or initialise the biases "
            "at zero or slightly above.",
            {"share": worst, "layers": float(bad.sum())},
            score=float(bad.sum()),
        )


class UnusedParameters:
    """A parameter that requires a gradient and has had none in its first 50 steps.

    PyTorch leaves `grad` at None for what the loss does not depend on: a module that forward
    does not call, a detached branch, or weights replaced after the optimizer was made.
    """

    name: ClassVar[str] = "unused_parameters"
    lasting: ClassVar[bool] = True

    def __init__(self) -> None:
        self._with_gradient: set[str] = set()
        self._since: dict[str, int] = {}  # name -> rows since it came

    def look(self, run: Run) -> Symptom | None:
        new, names = run.new, run.history.names
        if "grad" not in new.statistics:
            return None
        had = np.any(new.statistic("grad", "numel") > 0, axis=0)
        self._with_gradient.update(names[column] for column in np.flatnonzero(had))
        if len(self._with_gradient) == len(names):
            return None
        for name in names:
            self._since[name] = self._since.get(name, 0) + len(new)
        without = np.array(
            [n not in self._with_gradient and self._since[n] >= LEAST for n in names], np.bool_
        )
        if not without.any() or without.all():
            return None
        return Symptom(
            "warning",
            f"{some(names, without)} requires a gradient and has had none since the start "
            f"({without.sum()} of {len(names)} parameters)",
            "Call the module in forward, remove a detach(), or set requires_grad=False if it is "
            "meant to be frozen.",
            {"parameters": float(without.sum())},
            score=float(without.sum()),
        )


class LeftOutParameters:
    """A parameter that required a gradient at the start and that no watched optimizer steps.

    The optimizer was made from a part of the model, or before a module was added. Only known where
    the statistics are those of the optimizer's parameters, as under `watch`.
    """

    name: ClassVar[str] = "left_out_parameters"
    lasting: ClassVar[bool] = True

    def look(self, run: Run) -> Symptom | None:
        names = set(run.history.names)
        if not names or len(run.history) < LEAST:
            return None
        known = run.options.parameters
        missing = [name for name, info in known.items() if info.trainable and name not in names]
        if not missing:
            return None
        return Symptom(
            "warning",
            f"{some(missing, np.ones(len(missing), np.bool_))} requires a gradient and is in "
            f"none of the watched optimizers ({len(missing)} of {len(known)} parameters)",
            _ADVICE,
            {"parameters": float(len(missing))},
            score=float(len(missing)),
        )


class FrozenParameters:
    """A parameter that has a gradient and does not change, while others do.

    Its update is exactly zero, or there never is one: it is in a group whose learning rate is 0, or
    missing from the optimizer. 16-bit parameters are left to `lost_updates`: theirs may round to
    nothing.
    """

    name: ClassVar[str] = "frozen_parameters"
    lasting: ClassVar[bool] = True

    def look(self, run: Run) -> Symptom | None:
        history = run.history
        for rows in (WINDOW, None):  # None: updates are measured rarely
            update = history.statistic("update", "abs_max", rows)
            taken = (update > 0).any(1)  # not the steps of a learning rate of 0
            numbers = history.numbers(rows)[taken]
            if len(numbers) >= LEAST_UPDATES and numbers[-1] - numbers[0] >= LEAST - 1:
                break
        else:
            return None
        if not _others_move(run, rows):  # then everything stands still, which is another fault
            return None
        gradient = history.statistic("grad", "abs_max", rows)[taken]
        frozen = self._frozen(update[taken], gradient) & ~run.columns.sixteen_bit
        if not frozen.any():
            return None
        return Symptom(
            "warning",
            f"{some(history.names, frozen)} has a gradient and has not changed between step "
            f"{numbers[0]} and step {numbers[-1]} ({frozen.sum()} of {frozen.size} parameters)",
            _ADVICE,
            {"parameters": float(frozen.sum()), "steps": float(len(numbers))},
            score=float(frozen.sum()),
        )

    @staticmethod
    def _frozen(update: np.ndarray, gradient: np.ndarray) -> Flags:
        """[T], of updates and gradients [n, T], the largest elements of each."""
        seen = gradient > 0
        still = (seen.sum(0) >= LEAST_UPDATES) & ~(update > 0).any(0) & seen[-1]
        # The gradient of a bias before a BatchNorm is nothing but rounding errors, and rounds away.
        usual = np.median(gradient[-1][seen[-1]]) if still.any() else 0.0
        return still & (gradient[-1] > 1e-4 * usual)


def _others_move(run: Run, rows: int | None) -> bool:
    """Whether updates are large enough (1e-5 of the parameters) to show in float32's 24 bits."""
    update = run.history.total_norm("update", rows)
    ratio = update / run.history.total_norm("param", rows)
    ratio = ratio[update > 0]
    return len(ratio) > 0 and bool(np.median(ratio) > 1e-5)
