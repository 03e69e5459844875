"""What a rule is, and what it may look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from pyvizllm.telemetry.diagnosis.layers import gradient_by_depth
from pyvizllm.telemetry.diagnosis.losses import LossTrack
from pyvizllm.telemetry.diagnosis.ratios import UpdateRatios
from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import Flags, Floats, Severity, Steps

SIXTEEN_BITS = ("float16", "bfloat16")
# Names of what takes rows out of a table: most of its gradient is zero at every step.
_TABLES = ("embed", "wte", "wpe")
_VECTORS = ("bias", "norm", "ln_", "bn")


@dataclass(frozen=True)
class ParameterInfo:
    """What statistics do not say of a parameter."""

    shape: tuple[int, ...]
    dtype: str  # "float32"
    trainable: bool = True  # whether it required a gradient at the start

    @classmethod
    def of(cls, parameter: Tensor) -> ParameterInfo:
        """Of a parameter as it is now; reads nothing from its device."""
        dtype = str(parameter.dtype).removeprefix("torch.")
        return cls(tuple(parameter.shape), dtype, parameter.requires_grad)


@dataclass(frozen=True)
class DiagnosisOptions:
    """What the rules cannot see in the numbers.

    Arguments:
        parameters: shape and dtype by name. A parameter without is judged by its name, and the
            rules about 16-bit parameters pass it over.
        classes: number of classes of the loss. None: inferred from the entropy of the first
            predictions, which is close to log(classes) before anything is learnt.
        off: names of rules that shall be silent.
    """

    parameters: Mapping[str, ParameterInfo] = field(default_factory=dict)
    classes: int | None = None
    off: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Symptom:
    """What a rule sees now; the engine decides whether it is worth saying (again)."""

    severity: Severity
    message: str
    advice: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    score: float = 1.0  # said again when it has doubled
    step: int | None = None  # None: the newest


@dataclass(frozen=True)
class Columns:
    """What is known of each of the T parameters beside its statistics."""

    matrices: Flags  # [T] weights: no biases, norms or embeddings
    biases: Flags  # [T]
    sixteen_bit: Flags  # [T] known to be float16 or bfloat16

    @classmethod
    def of(cls, names: Sequence[str], parameters: Mapping[str, ParameterInfo]) -> Columns:
        """Of these parameters, in this order."""
        infos = [parameters.get(name) for name in names]
        return cls(
            np.array(list(map(_is_matrix, names, infos)), np.bool_),
            np.array([name.endswith("bias") for name in names], np.bool_),
            np.array([info is not None and info.dtype in SIXTEEN_BITS for info in infos], np.bool_),
        )


def is_table(name: str) -> bool:
    """Whether it sounds like what rows are taken out of: an embedding."""
    return any(part in name.lower() for part in _TABLES)


def _is_matrix(name: str, info: ParameterInfo | None) -> bool:
    """Whether it has two or more dimensions, or sounds like it, and is no embedding."""
    lower = name.lower()
    if is_table(name):
        return False
    if info is not None:
        return len(info.shape) >= 2
    return not any(part in lower for part in _VECTORS)


@dataclass
class Run:
    """What a rule may look at: the last steps, of which `new` came just now, and the losses."""

    options: DiagnosisOptions
    history: History
    losses: LossTrack
    columns: Columns
    ratios: UpdateRatios
    new: Steps

    # No cached_property: up to Python 3.11 that has a lock, which a fork of the training in such a
    # moment leaves locked in the child for ever.
    _by_depth: list[tuple[list[str], Floats] | None] = field(default_factory=list, init=False)

    @property
    def gradient_by_depth(self) -> tuple[list[str], Floats] | None:
        """Layers, and log10 of the root mean square of their gradients; None where too few."""
        if not self._by_depth:
            self._by_depth.append(gradient_by_depth(self.history, self.columns.matrices))
        return self._by_depth[0]

    def warming_up(self, rows: int) -> bool:
        """Whether the learning rate has risen within the last `rows` steps.

        What a rate that still rises has not moved yet is no fault. Without a logged rate, the size
        of the updates tells.
        """
        rate = self.history.learning_rate(rows)
        rate = rate[~np.isnan(rate)]
        if len(rate) < 2:
            rate = self.history.total_norm("update", rows)
            rate = rate[~np.isnan(rate)]
            quarter = len(rate) // 4
            return quarter > 0 and bool(
                np.median(rate[-quarter:]) > 1.5 * np.median(rate[:quarter])
            )
        return bool(rate[-1] > 1.01 * rate[0])


class Rule(Protocol):
    """One fault: called after every hand-over, on the publisher's thread, with O(rows * T) work."""

    name: ClassVar[str]
    lasting: ClassVar[bool]  # a state, of which one can say that it is gone; or an event

    def look(self, run: Run) -> Symptom | None:
        """What there is to say at the newest step, or None."""


def some(names: Sequence[str], chosen: Flags, most: int = 3) -> str:
    """The first of the chosen names, and how many there are beyond them."""
    picked = [names[int(index)] for index in np.flatnonzero(chosen)]
    rest = len(picked) - most
    return ", ".join(picked[:most]) + (f" and {rest} more" if rest > 0 else "")
