"""The operations: softmax cross-entropy and tensor statistics."""

from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.metrics import CrossEntropyMetrics
from pyvizllm.ops.tensor_stats import BINS, TensorStats, tensor_stats

__all__ = ["BINS", "CrossEntropyMetrics", "TensorStats", "cross_entropy", "tensor_stats"]
