"""The diagnosis and the flight recorder, as a part of what makes publications."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from pyvizllm.telemetry.assembler import Draft
from pyvizllm.telemetry.diagnosis import Diagnosis
from pyvizllm.telemetry.flight_recorder import TRIGGERS, FlightRecorder, flight_text
from pyvizllm.telemetry.records import Finding, Publication, Steps
from pyvizllm.telemetry.terminal import finding_line

_logger = logging.getLogger("pyvizllm")


class Diagnosing:
    """Looks at every step; what it finds is published with the next publication.

    What is serious is logged at once, as a warning, unless a terminal shows it anyway.

    Called by the publisher's thread alone.

    Arguments:
        diagnosis: the rules, and the history they look at.
        recorder: dumps that history when something goes wrong; None for no dumps.
        shown: whether a sink writes the findings into the terminal.
    """

    def __init__(
        self, diagnosis: Diagnosis, recorder: FlightRecorder | None, *, shown: bool = False
    ) -> None:
        self._diagnosis, self._recorder, self._shown = diagnosis, recorder, shown
        self._new: list[Finding] = []
        self._text = ""  # about the last dump, until it is published

    def add(self, steps: Steps) -> None:
        """Look at steps, in their order."""
        findings = self._diagnosis.add(steps)
        self._log(findings)
        self._new += findings
        path = None if self._recorder is None else self._recorder.react(findings)
        if path is not None:
            grave = [finding for finding in findings if finding.rule in TRIGGERS]
            self._text = flight_text(path, grave[0].rule, grave[0].step, grave)

    def publish(self, draft: Draft) -> None:
        """Say what has been found."""
        if self._text:
            draft.texts["flight"], self._text = self._text, ""
        draft.findings += self._new
        self._new = []

    def evaluated(self, publication: Publication) -> Publication:
        """A publication of an evaluation, with what it shows."""
        findings = self._diagnosis.add_evaluation(publication.step, publication.scalars)
        self._log(findings)
        return replace(publication, findings=[*publication.findings, *findings])

    def dump(self, reason: str, step: int) -> Publication | None:
        """Write the history: the process is told to end, or training has failed.

        Returns what tells of the dump; None where there is none.
        """
        path = None if self._recorder is None else self._recorder.dump(reason, step)
        if path is None:
            return None
        return Publication(step, time.time(), texts={"flight": flight_text(path, reason, step)})

    def _log(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if finding.severity == "serious" and not self._shown:
                _logger.warning("pyvizllm: %s", finding_line(finding))
