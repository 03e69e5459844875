"""The dashboard that TensorBoard opens with: charts of several tags each (custom scalars)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LAYOUT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Training": {
        "loss": ["train/loss", "eval/loss"],
        "accuracy": ["train/accuracy", "eval/accuracy"],
        "learning rate": ["train/learning_rate"],
        "tokens a second": ["train/tokens_per_second"],
    },
    "Gradients and updates": {
        "gradient norm": ["train/grad_norm", "train/grad_norm_max"],
        "gradient norm by layer": ["layer_grad_norm/.*"],
        "update / weight by layer": ["layer_update_ratio/.*"],
        "share of steps clipped": ["train/clipped"],
    },
    "Health": {
        "NaN and Inf in gradients": ["health/nans", "health/infs"],
        "zeros in gradients": ["health/zeros"],
        "skipped steps": ["health/skipped_steps"],
    },
    "Trajectory": {
        "distance": ["trajectory/distance", "trajectory/path_length"],
        "cosine of successive moves": ["trajectory/update_cosine"],
        "which layers moved": ["moved/.*"],
        "gradient noise scale": ["noise/scale"],
    },
    "pyvizllm": {
        "overhead in per cent": ["pyvizllm/overhead_pct"],
        "dropped publications": ["pyvizllm/dropped"],
    },
}
"""Category -> chart -> regular expressions of tags."""
