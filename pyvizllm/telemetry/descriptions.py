"""What each tag means and at which stage it is measured, as TensorBoard shows it beside a chart."""

_BY_TAG = {
    "train/loss": "Mean of the losses that were logged in the interval; where there are none, mean "
    "negative log-likelihood of its counted targets, in nats, without label smoothing and z-loss.",
    "train/accuracy": "Share of the interval's counted targets that are the likeliest class.",
    "train/perplexity": "exp(train/loss).",
    "train/entropy": "Mean entropy of the predictions at the counted targets, in nats.",
    "train/learning_rate": "The one that was logged last; where none is logged, that of the "
    "optimizer's first parameter group in the last step.",
    "train/grad_norm": "Norm of all watched gradients together: mean over the interval's steps.",
    "train/grad_norm_max": "Norm of all watched gradients together: the largest of a step.",
    "train/clipped": "Share of the interval's steps whose norm was above the max_norm that "
    "pyvizllm clips to; those whose norm was NaN are left out.",
    "train/tokens_per_second": "Counted targets a second, without evaluations and checkpoints.",
    "train/steps_per_second": "Optimizer steps a second, without what `Watch.paused` leaves out; "
    "where no metrics count the targets.",
    "health/nans": "NaNs in the watched gradients of the interval's steps.",
    "health/infs": "Infinities in the watched gradients of the interval's steps.",
    "health/zeros": "Share of the watched gradients' elements that are exactly zero.",
    "health/skipped_steps": "Steps of the interval that changed nothing, for gradients that were "
    "not finite: by skip_nonfinite; by GradScaler with optimizers that take its scale, as fused "
    "ones and pyvizllm.AdamW, and where pyvizllm.clip_grad_norm_ clips. Others it skips unseen.",
    "heatmap/grad_norm": "log10 of each layer's gradient norm (down) at every step (across).",
    "trajectory/path_length": "Length of the parameters' path through the publications, estimated "
    "from a sketch of 64 numbers a parameter (standard error below 9 %).",
    "trajectory/distance": "Distance of all parameters from the start, estimated from a sketch.",
    "trajectory/update_cosine": "Cosine between the parameters' last two displacements from one "
    "publication to the next: near 1 is a straight path, near 0 a random walk.",
    "noise/scale": "Gradient noise scale B_simple (McCandlish et al. 2018), in examples or "
    "targets: batches far below it gain from being larger, batches far above it waste compute.",
    "pyvizllm/dropped": "Publications lost since the start: the disk was too slow, or they could "
    "not be made.",
    "pyvizllm/overhead_pct": "What telemetry took of the interval's time, in per cent.",
    "pyvizllm/publish_every": "Steps between two publications.",
    "pyvizllm/measure_every": "Steps between two that are measured.",
}
_BY_KIND = {
    "grad": "Gradient, unscaled and accumulated: the values of all measured steps.",
    "grad_log10": "log10 of the gradient's magnitude without zeros: all measured steps.",
    "grad_norm": "Norm of the gradient: mean over the measured steps that had one.",
    "param": "Parameter, after the last step of the interval.",
    "param_log10": "log10 of the parameter's magnitude without zeros, after the last step.",
    "param_norm": "Norm of the parameter, after the last measured step.",
    "update": "Change that the last step of the interval made to the parameter.",
    "update_log10": "log10 of the magnitude, without zeros, of the change that the last step made.",
    "update_ratio": "Norm of the update / norm of the parameter after it: mean of measured steps.",
    "layer_grad_norm": "Norm of the gradients of a layer: mean over the measured steps.",
    "layer_update_ratio": "Norm of a layer's update / norm of its parameters after it: mean over "
    "the measured steps.",
    "moved": "Relative change: distance of a layer's parameters from the start / their norm at the "
    "start, estimated from a sketch.",
}
_GRADIENTS = (
    *("train/grad_norm", "train/grad_norm_max", "health/nans", "health/infs", "health/zeros"),
    *("grad", "grad_log10", "grad_norm", "layer_grad_norm", "heatmap/grad_norm"),
)
STAGE_TAG = "pyvizllm/gradient_stage"
"""A text: whether gradients were measured before clipping. It is shown anew when that changes."""


_SEE = f" Before or after clipping: see the text {STAGE_TAG}."
_TEXTS = {
    name: text + (_SEE if name in _GRADIENTS else "") for name, text in (_BY_TAG | _BY_KIND).items()
}


def description(tag: str) -> str:
    """What `tag` means; empty for one that a user has chosen."""
    text = _TEXTS.get(tag)
    return _TEXTS.get(tag.partition("/")[0], "") if text is None else text
