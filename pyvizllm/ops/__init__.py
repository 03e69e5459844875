"""The operations: softmax cross-entropy, tensor statistics and gradient clipping."""

from pyvizllm.ops.clip_grad_norm import clip_grad_norm_
from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.first_nonfinite import decode_nonfinite, first_nonfinite_
from pyvizllm.ops.linear_cross_entropy import linear_cross_entropy
from pyvizllm.ops.metrics import CrossEntropyMetrics, PerToken
from pyvizllm.ops.sketch import SKETCH_SIZE, sketch
from pyvizllm.ops.tensor_stats import BINS, TensorStats, tensor_stats
from pyvizllm.ops.vocab_parallel import vocab_parallel_cross_entropy
from pyvizllm.ops.vocab_parallel_linear import vocab_parallel_linear_cross_entropy

__all__ = [
    "BINS",
    "SKETCH_SIZE",
    "CrossEntropyMetrics",
    "PerToken",
    "TensorStats",
    "clip_grad_norm_",
    "cross_entropy",
    "decode_nonfinite",
    "first_nonfinite_",
    "linear_cross_entropy",
    "sketch",
    "tensor_stats",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
