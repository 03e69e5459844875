"""The operations: softmax cross-entropy, tensor statistics and gradient clipping."""

from pyvizllm.ops.clip_grad_norm import clip_grad_norm_
from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from pyvizllm.ops.metrics import CrossEntropyMetrics, PerToken
from pyvizllm.ops.tensor_stats import BINS, TensorStats, tensor_stats
from pyvizllm.ops.vocab_parallel import vocab_parallel_cross_entropy
from pyvizllm.ops.vocab_parallel_linear import vocab_parallel_linear_cross_entropy

__all__ = [
    "BINS",
    "CrossEntropyMetrics",
    "LinearCrossEntropyLoss",
    "PerToken",
    "TensorStats",
    "clip_grad_norm_",
    "cross_entropy",
    "linear_cross_entropy",
    "tensor_stats",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
