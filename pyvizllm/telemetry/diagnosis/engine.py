"""Puts the rules to work: what they see is said once, and again only when it got worse."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pyvizllm.telemetry.diagnosis.clipping import ConstantClipping
from pyvizllm.telemetry.diagnosis.depth import (
    ExplodingGradients,
    GrowingGradients,
    VanishingGradients,
)
from pyvizllm.telemetry.diagnosis.learning_rate import LearningRateTooHigh, LearningRateTooLow
from pyvizllm.telemetry.diagnosis.logits import ProbabilitiesAsLogits, WrongSign
from pyvizllm.telemetry.diagnosis.losses import LossTrack
from pyvizllm.telemetry.diagnosis.nonfinite import NonFinite
from pyvizllm.telemetry.diagnosis.overfitting import Overfitting
from pyvizllm.telemetry.diagnosis.parameters import (
    DeadParameters,
    DeadUnits,
    FrozenParameters,
    LeftOutParameters,
    UnusedParameters,
)
from pyvizllm.telemetry.diagnosis.precision import GradientUnderflow, LostUpdates, SkippedSteps
from pyvizllm.telemetry.diagnosis.predictions import (
    ConstantPredictions,
    EntropyCollapse,
    IgnoredTargets,
    LossAtChance,
)
from pyvizllm.telemetry.diagnosis.ratios import UpdateRatios
from pyvizllm.telemetry.diagnosis.repetition import RepeatedLosses, RepeatedSamples
from pyvizllm.telemetry.diagnosis.rule import Columns, DiagnosisOptions, Rule, Run, Symptom
from pyvizllm.telemetry.diagnosis.spikes import Divergence, LossSpike, Plateau
from pyvizllm.telemetry.diagnosis.uncleared import UnclearedGradients
from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import Finding, Severity, Steps, is_evaluation

RULES: tuple[type[Rule], ...] = (
    NonFinite,
    LossSpike,
    Divergence,
    VanishingGradients,
    ExplodingGradients,
    GrowingGradients,
    UnclearedGradients,
    LearningRateTooHigh,
    LearningRateTooLow,
    DeadParameters,
    DeadUnits,
    UnusedParameters,
    LeftOutParameters,
    FrozenParameters,
    GradientUnderflow,
    LostUpdates,
    SkippedSteps,
    ConstantClipping,
    WrongSign,
    ProbabilitiesAsLogits,
    LossAtChance,
    ConstantPredictions,
    EntropyCollapse,
    IgnoredTargets,
    RepeatedSamples,
    RepeatedLosses,
    Plateau,
)
"""Those that `Diagnosis` begins with; it makes an `Overfitting` for each loss of evaluations."""
CALM = 64
"""Steps without a symptom after which it is gone."""
RANKS: Mapping[Severity, int] = {"info": 0, "warning": 1, "serious": 2}
RESOLVED = "resolved"
"""Key in the evidence of a finding that takes an earlier one of its rule back."""

_logger = logging.getLogger("pyvizllm")


def descriptions() -> dict[str, str]:
    """What each rule looks for, by its name: the first line of its docstring."""
    rules: tuple[type[Rule], ...] = (*RULES, Overfitting)
    return {rule.name: (rule.__doc__ or "").partition("\n")[0] for rule in rules}


@dataclass
class _Said:
    """What a rule has said last, and until when its symptom was seen."""

    severity: Severity
    score: float
    seen: int


class Diagnosis:
    """Looks at every step and says what goes wrong, with figures and advice.

    A finding comes once; again when its severity rises or its score doubles, or after it was gone
    for 64 steps, which a finding of severity "info" with `evidence["resolved"]` announces; not
    while there are NaNs or Infs. A rule that raises is logged once and switched off.

    Called by one thread, the publisher's: steps in order, O(T) work for each in NumPy.

    Arguments:
        options: what the numbers do not tell: shapes, dtypes, the number of classes.
        history: where the steps are kept; a flight recorder may share it.

    Example:
        >>> diagnosis = Diagnosis(DiagnosisOptions(classes=10))
        >>> for finding in diagnosis.add(steps):
        ...     print(finding.severity, finding.message, finding.advice)
    """

    def __init__(
        self, options: DiagnosisOptions | None = None, history: History | None = None
    ) -> None:
        self.options = options or DiagnosisOptions()
        self.history = History() if history is None else history
        self._rules: list[Rule] = [rule() for rule in RULES]
        self._overfitting: dict[str, Overfitting] = {}  # by the tag of the evaluation's loss
        self._off = set(self.options.off)  # and those that have failed
        self._losses = LossTrack()
        self._said: dict[Rule, _Said] = {}
        self._blind = False  # what NaN hides is not gone
        self._ratios = UpdateRatios()
        self._columns = Columns.of((), {})
        self._new = Steps(0, (), {}, np.empty(0))

    def add(self, steps: Steps) -> list[Finding]:
        """Take in the steps that follow; return what there is to say about them."""
        if len(steps) == 0:
            return []
        if steps.names != self.history.names:
            self._columns = Columns.of(steps.names, self.options.parameters)
        self.history.append(steps)
        with np.errstate(all="ignore"):
            self._losses.add(self.history, len(steps))
            self._ratios.add(self.history, self._columns.matrices, len(steps))
        self._new = steps
        return self._look(self._rules)

    def add_evaluation(self, step: int, scalars: Mapping[str, float]) -> list[Finding]:
        """Take in what an evaluation after `step` found ("eval/loss"); return what it shows."""
        rules = []
        for tag in scalars:
            if is_evaluation(tag) and tag.endswith("/loss"):
                rules.append(self._overfitting.setdefault(tag, Overfitting()))
                rules[-1].evaluated(step, tag, scalars[tag])
        return self._look(rules) if len(self.history) else []

    def _look(self, rules: Sequence[Rule]) -> list[Finding]:
        run = Run(self.options, self.history, self._losses, self._columns, self._ratios, self._new)
        newest = int(self.history.numbers(1)[0])
        findings: list[Finding] = []
        for rule in rules:
            if rule.name in self._off:
                continue
            try:
                with np.errstate(all="ignore"):  # NaN and Inf are what it is all about
                    symptom = rule.look(run)
            except Exception:
                _logger.warning(
                    "diagnosis: the rule %s failed and is switched off", rule.name, exc_info=True
                )
                self._off.add(rule.name)
                continue
            if isinstance(rule, NonFinite):
                self._blind = symptom is not None
            if finding := self._judge(rule, symptom, newest):
                findings.append(finding)
        return findings

    def _judge(self, rule: Rule, symptom: Symptom | None, newest: int) -> Finding | None:
        """What is said of a symptom, or of its absence."""
        said = self._said.get(rule)
        if symptom is None:
            if said is None or self._blind or newest - said.seen < CALM:
                return None
            del self._said[rule]
            lasting = rule.lasting and said.severity != "info"
            return _resolved(rule.name, said, newest) if lasting else None
        if said is not None:
            said.seen = newest
            worse = RANKS[symptom.severity] > RANKS[said.severity]
            grown = symptom.score >= 2 * said.score and symptom.score > said.score  # of 0, too
            if not worse and not grown:
                return None
        self._said[rule] = _Said(symptom.severity, symptom.score, newest)
        step = newest if symptom.step is None else symptom.step
        return Finding(
            rule.name, symptom.severity, step, symptom.message, symptom.advice, symptom.evidence
        )


def _resolved(rule: str, said: _Said, newest: int) -> Finding:
    words = rule.replace("_", " ")
    return Finding(
        rule,
        "info",
        newest,
        f"{words}: not seen since step {said.seen}",
        "",
        {RESOLVED: f"{said.severity} of step {said.seen}"},
    )
