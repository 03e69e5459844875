"""The dtypes that operations take, and those in which they add up."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What every kernel reads."""

INDICES = (torch.int64, torch.int32, torch.uint8)
"""Of class indices."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums and losses: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
