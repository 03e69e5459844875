"""Optimizers that see what they do."""

from pyvizllm.optim.adamw import AdamW
from pyvizllm.optim.collection import StepStatistics

__all__ = ["AdamW", "StepStatistics"]
