"""linear_cross_entropy forward and backward against torch's, with all logits and chunked.

2048 x 768 x 50257: a batch of 2048 tokens, and GPT-2's width and vocabulary; 412 MB of float32
logits, and 154 MB of gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy_memory import peak_bytes
from torch import Tensor

from pyvizllm.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, FEATURES, CLASSES = 2048, 768, 50257
