"""The operations: softmax cross-entropy, tensor statistics and gradient clipping."""

from pyvizllm.ops.clip_grad_norm import clip_grad_norm_
from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.metrics import CrossEntropyMetrics, PerToken
from pyvizllm.ops.tensor_stats import BINS, TensorStats, tensor_stats

__all__ = [
    "BINS",
    "CrossEntropyMetrics",
    "PerToken",
    "TensorStats",
    "clip_grad_norm_",
    "cross_entropy",
    "tensor_stats",
]
