"""What goes wrong in a training, said with figures and advice."""

from pyvizllm.telemetry.diagnosis.engine import RANKS, RESOLVED, RULES, Diagnosis, descriptions
from pyvizllm.telemetry.diagnosis.rule import DiagnosisOptions, ParameterInfo, Rule, Symptom

__all__ = [
    "RANKS",
    "RESOLVED",
    "RULES",
    "Diagnosis",
    "DiagnosisOptions",
    "ParameterInfo",
    "Rule",
    "Symptom",
    "descriptions",
]
