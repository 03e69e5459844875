"""The training loop and what it needs: options, data order, schedules, checkpoints."""

from pyvizllm.training.config import TrainConfig
from pyvizllm.training.text import TextDataset
from pyvizllm.training.trainer import TrainResult, train

__all__ = ["TextDataset", "TrainConfig", "TrainResult", "train"]
