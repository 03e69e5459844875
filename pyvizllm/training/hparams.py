"""The settings of a run for TensorBoard's table of runs: those that are in force."""

from numbers import Real

from torch.optim.lr_scheduler import LRScheduler

from pyvizllm.training.objective import CrossEntropyObjective
from pyvizllm.training.preparation import Run

__all__ = ["hparams_of"]

_ALWAYS = ("gradient_accumulation_steps", "max_grad_norm", "seed", "bf16")
_OF_BATCHES = ("per_device_train_batch_size",)
_OF_SCHEDULE = ("lr_scheduler_type", "warmup_steps")
_OF_LOSS = ("label_smoothing_factor", "z_loss")


def hparams_of(run: Run, lr_scheduler: LRScheduler | None) -> dict[str, bool | float | str]:
    """What is set, by the names of TrainConfig; what the configuration does not decide is left out.

    Arguments:
        run: as it is about to start.
        lr_scheduler: the caller's own, which stands for that of the configuration.
    """
    config = run.config
    names = [*_ALWAYS]
    if "batch size" in run.train_source.identity:  # else the batches came as they are
        names += _OF_BATCHES
    if lr_scheduler is None:
        names += _OF_SCHEDULE
    if isinstance(run.objective, CrossEntropyObjective):
        names += _OF_LOSS
    if run.total_steps is None:
        names.append("num_train_epochs")
    shown = {name: getattr(config, name) for name in names}
    if run.total_steps is not None:
        shown["max_steps"] = run.total_steps
    if lr_scheduler is not None:
        shown["lr_scheduler_type"] = type(lr_scheduler).__name__
    return {**shown, "optim": type(run.optimizer).__name__, **_of_optimizer(run)}


def _of_optimizer(run: Run) -> dict[str, float]:
    """The optimizer's own: a resumed one goes on with those of its checkpoint."""
    groups = run.optimizer.param_groups
    first = groups[0]
    settings = {
        "learning_rate": first.get("initial_lr", first.get("lr")),
        **{f"adam_beta{number}": beta for number, beta in enumerate(first.get("betas", ()), 1)},
        "adam_epsilon": first.get("eps"),
        "momentum": first.get("momentum"),
    }
    decays = [group["weight_decay"] for group in groups if "weight_decay" in group]
    if decays and all(isinstance(decay, Real) for decay in decays):
        settings["weight_decay"] = max(decays)  # biases and norms are in a group without
    # A tensor's value is on the device.
    return {name: float(value) for name, value in settings.items() if isinstance(value, Real)}
