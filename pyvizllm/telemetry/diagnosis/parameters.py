"""Parameters that do not learn: dead, without a gradient, or left out of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.columns import measured
from pyvizllm.telemetry.diagnosis.depth import vanishes
from pyvizllm.telemetry.diagnosis.ratios import LEAST_UPDATES
from pyvizllm.telemetry.diagnosis.rule import Run, Symptom, some
from pyvizllm.telemetry.records import Flags, Kind, Steps

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
    and Karniadakis, 2019, "Dying ReLU"). A bias alone, whose weight has a gradient, is no fault:
    the loss does not depend on a shift, as that of a Wasserstein critic.
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
        dead &= ~_shifts_nothing(run.history.names, dead)
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


def _shifts_nothing(names: Sequence[str], dead: Flags) -> Flags:
    """[T]: which are biases beside a weight that is not dead."""
    alive = {name for name, flag in zip(names, dead, strict=True) if not flag}
    beside = (name.removesuffix("bias") + "weight" for name in names)
    found = (
        n.endswith("bias") and weight in alive for n, weight in zip(names, beside, strict=True)
    )
    return np.fromiter(found, np.bool_, len(names))


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
        largest = run.history.statistic("grad", "abs_max", WINDOW)[:, biases]
        zeros[np.isnan(largest)] = np.nan  # NaN beside them: they may hide behind one
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
            f"{measured(zeros)[bad].max()} steps",
            "Lower the learning rate, use a leaky activation or GELU, or initialise the biases "
            "at zero or slightly above.",
            {"share": worst, "layers": float(bad.sum())},
            score=float(bad.sum()),
        )


class UnusedParameters:
    """A parameter that requires a gradient and has had none in its first 50 steps.

    PyTorch leaves `grad` at None for what the loss does not depend on: a module that forward
    does not call, a detached branch, or weights replaced after the optimizer was made. What moves
    all the same has a gradient that cannot be measured, such as a sparse one. Where none of them
    has one, or all are exactly zero, the optimizer steps without what backward has computed.
    """

    name: ClassVar[str] = "unused_parameters"
    lasting: ClassVar[bool] = True

    def __init__(self) -> None:
        self._with_gradient: set[str] = set()
        self._all_zero = True  # every gradient so far
        self._moved: set[str] = set()
        self._looked_at: set[str] = set()  # those that would be known to have moved
        self._measured = False  # whether anything can be: Partial DTensors cannot
        self._since: dict[str, int] = {}  # name -> rows since it came

    def look(self, run: Run) -> Symptom | None:
        new, names = run.new, run.history.names
        if "grad" not in new.statistics:
            return None
        zero, other = _seen(new, "grad")
        self._with_gradient |= zero | other
        self._all_zero &= not other
        self._measured |= bool(zero | other)
        if "update" in new.statistics:
            still, moved = _seen(new, "update")
            self._moved |= moved
            self._looked_at.update(names)
            self._measured |= bool(still | moved)
        for name in names:
            self._since[name] = self._since.get(name, 0) + len(new)
        idle = self._looked_at - self._moved - self._with_gradient
        if self._all_zero:
            idle |= self._with_gradient
        without = np.array([n in idle and self._since[n] >= LEAST for n in names], np.bool_)
        if not without.any():
            return None
        if without.all():
            return _without_backward(len(names)) if self._measured else None
        require, have = ("requires", "has") if without.sum() == 1 else ("require", "have")
        return Symptom(
            "warning",
            f"{some(names, without)} {require} a gradient and {have} had none since the start "
            f"({without.sum()} of {len(names)} parameters)",
            "Call the module in forward, remove a detach(), or set requires_grad=False if it is "
            "meant to be frozen. An expert that is never chosen needs a loss that balances them.",
            {"parameters": float(without.sum())},
            score=float(without.sum()),
        )


def _seen(steps: Steps, kind: Kind) -> tuple[set[str], set[str]]:
    """Names of what was exactly zero in a step in which it was measured, and of what was not."""
    largest, measured = steps.statistic(kind, "abs_max"), steps.statistic(kind, "numel") > 0
    zero, other = measured & (largest == 0), measured & (largest != 0)  # NaN is not zero
    columns = (np.flatnonzero(flags.any(0)).tolist() for flags in (zero, other))
    first, second = ({steps.names[column] for column in chosen} for chosen in columns)
    return first, second


def _without_backward(parameters: int) -> Symptom:
    return Symptom(
        "serious",
        f"none of the {parameters} parameters has had a gradient other than zero since the start",
        "Call loss.backward() before optimizer.step(), and zero_grad() before both or after both; "
        "see that the loss is not detached, nor always 0.",
        {"parameters": float(parameters)},
        score=float(parameters),
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
        require, are = ("requires", "is") if len(missing) == 1 else ("require", "are")
        return Symptom(
            "warning",
            f"{some(missing, np.ones(len(missing), np.bool_))} {require} a gradient and {are} in "
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
        if not _others_move(run, rows) or vanishes(run):  # which are other faults
            return None
        gradient = history.statistic("grad", "abs_max", rows)[taken]
        frozen = self._frozen(update[taken], gradient) & ~run.columns.sixteen_bit
        if not frozen.any():
            return None
        have = "has" if frozen.sum() == 1 else "have"
        return Symptom(
            "warning",
            f"{some(history.names, frozen)} {have} a gradient and {have} not changed between step "
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
