"""See inside every training step, for free."""

import importlib
import sys
from typing import TYPE_CHECKING

from pyvizllm.info import version as _version
from pyvizllm.nn import CrossEntropyLoss, LinearCrossEntropyLoss
from pyvizllm.ops import (
    CrossEntropyMetrics,
    TensorStats,
    clip_grad_norm_,
    cross_entropy,
    linear_cross_entropy,
    tensor_stats,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from pyvizllm.optim import AdamW

__version__ = _version()
__all__ = [
    "AdamW",
    "CrossEntropyLoss",
    "CrossEntropyMetrics",
    "LinearCrossEntropyLoss",
    "TensorStats",
    "TrainConfig",
    "TrainResult",
    "clip_grad_norm_",
    "cross_entropy",
    "linear_cross_entropy",
    "tensor_stats",
    "train",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "watch",
]
_ELSEWHERE = {"watch": "pyvizllm.telemetry"}  # the others are in pyvizllm.training

if TYPE_CHECKING:
    from pyvizllm.telemetry.watch import watch
    from pyvizllm.training import TrainConfig, TrainResult, train
else:
    # The kernels need torch alone. What writes TensorBoard's files is imported when it is first
    # asked for, so that the operations work where tensorboardX is not installed.
    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'pyvizllm' has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(_ELSEWHERE.get(name, "pyvizllm.training")), name)
        except ModuleNotFoundError as error:
            missing = str(error.name).partition(".")[0]
            raise ImportError(
                f"pyvizllm.{name}: expected {missing} to be installed, got none; "
                "install what pyvizllm needs: pip install -e . in the folder of its sources"
            ) from error

    def __dir__() -> list[str]:
        modules = [name for name in globals() if f"{__name__}.{name}" in sys.modules]
        public = (name for name in (*__all__, *modules) if not name.startswith("_"))
        return sorted({*public, "__version__"})
