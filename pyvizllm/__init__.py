"""See inside every training step, for free."""

from pyvizllm.info import version as _version
from pyvizllm.ops import (
    CrossEntropyMetrics,
    TensorStats,
    clip_grad_norm_,
    cross_entropy,
    tensor_stats,
)
from pyvizllm.training import TrainConfig, TrainResult, train

__version__ = _version()
__all__ = [
    "CrossEntropyMetrics",
    "TensorStats",
    "TrainConfig",
    "TrainResult",
    "clip_grad_norm_",
    "cross_entropy",
    "tensor_stats",
    "train",
]
