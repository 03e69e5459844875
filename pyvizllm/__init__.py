"""See inside every training step, for free."""

from pyvizllm.info import version as _version
from pyvizllm.ops import CrossEntropyMetrics, TensorStats, cross_entropy, tensor_stats
from pyvizllm.optim import AdamW
from pyvizllm.training import TrainConfig, TrainResult, train

__version__ = _version()
__all__ = [
    "AdamW",
    "CrossEntropyMetrics",
    "TensorStats",
    "TrainConfig",
    "TrainResult",
    "cross_entropy",
    "tensor_stats",
    "train",
]
