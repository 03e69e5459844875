"""What each tag means and at which stage it is measured, as TensorBoard shows it beside a chart."""

_STAGE = "unscaled, accumulated over the step's micro-batches, before clipping"
_BY_TAG = {
    "train/loss": "Mean negative log-likelihood of the interval's counted targets, in nats, "
    "without label smoothing and z-loss; what loss_fn returns, where it returns no metrics.",
    "train/accuracy": "Share of the interval's counted targets that are the likeliest class.",
    "train/perplexity": "exp(train/loss).",
    "train/entropy": "Mean entropy of the predictions at the counted targets, in nats.",
    "train/learning_rate": "That of the optimizer's first parameter group in the last step.",
    "train/grad_norm": f"Norm of all gradients together, {_STAGE}: mean over the steps.",
    "train/grad_norm_max": f"Norm of all gradients together, {_STAGE}: the largest of a step.",
    "train/tokens_per_second": "Counted targets a second, without evaluations and checkpoints.",
    "health/nans": f"NaNs in all gradients of the interval's steps, {_STAGE}.",
    "health/infs": f"Infinities in all gradients of the interval's steps, {_STAGE}.",
    "pyvizllm/dropped": "Publications lost because the disk was too slow, since the start.",
}
_BY_KIND = {
    "grad": f"Gradient, {_STAGE}: values of all steps of the interval.",
    "grad_log10": f"log10 of the gradient's magnitude without zeros, {_STAGE}: all steps.",
    "grad_norm": f"Norm of the gradient, {_STAGE}: mean over the steps that had one.",
}


def description(tag: str) -> str:
    """One sentence about `tag`; empty for one that a user has chosen."""
    return _BY_TAG.get(tag) or _BY_KIND.get(tag.partition("/")[0], "")
