"""`pyvizllm.watch` for the Trainer of Lightning, imported as `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.telemetry import Watch, watch
from pyvizllm.telemetry.records import EVALUATIONS, is_evaluation


def _lightning() -> Any:
    names = ("lightning.pytorch", "pytorch_lightning")
    # The one in use first: each is the whole of it, and takes seconds to import.
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ModuleNotFoundError(
        "pyvizllm.integrations.lightning: expected the package lightning or pytorch_lightning, "
        "got neither",
        name="lightning",
    )


pl: Any = _lightning()

# What Lightning adds to the name of a metric that is logged by step and by epoch.
_BY_STEP, _BY_EPOCH = re.compile(r"_step$"), re.compile(r"_epoch(?=$|/dataloader_idx_\d+$)")
_STAGE = re.compile(rf"^(train|{'|'.join(EVALUATIONS)})_")


class WatchCallback(pl.Callback):  # type: ignore[misc]
    """Watches the module that a Trainer trains, from the first step of `fit()` to its end.

    What the module logs by `self.log` is shown as well: train_loss as train/loss, the mean over the
    batches that a step accumulates; the mean over an epoch as train/loss_epoch; of validations
    val_loss as val/loss, but not of the sanity check. A training that goes on from a checkpoint
    goes on at its step. Gradients are those before the clipping of `gradient_clip_val`; with
    `pyvizllm.AdamW`, by value, or where the module configures it, those after it.

    Arguments:
        logdir: folder of the run, as in `pyvizllm.watch`. A second `fit()` goes on in it from
            its checkpoint, or begins anew, and hides what was there.
        options: all other keywords of `pyvizllm.watch`; the config is by default the module's
            `hparams`.

    Raises:
        TypeError, ValueError, OSError: in `fit()`, what `pyvizllm.watch` says of an option.

    Example:
        >>> trainer = Trainer(max_epochs=3, callbacks=[WatchCallback("runs/mine")])
        >>> trainer.fit(module, loader)
    """

    def __init__(self, logdir: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self._logdir, self._options = logdir, options
        self.watch: Watch | None = None
        self._done: int | None = None  # the watch's last step, by the checkpoint to go on from
        self._shown_step = 0  # whose logs are shown
        self._seen: dict[str, Tensor] = {}
        self._waiting: list[dict[str, Tensor]] = []  # logs of batches whose step is to come

    def state_dict(self) -> dict[str, Any]:
        """For the Trainer's checkpoint."""
        return {"step": self._done if self.watch is None else self.watch.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint that is gone on from."""
        self._done = state_dict["step"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The sanity check is over, the first batch is to come."""
        step = trainer.global_step  # of all its optimizers
        if step > 0 and self._done is not None:
            step = self._done
        options = {"config": dict(pl_module.hparams) or None, "start_step": step, **self._options}
        self.watch = watch(pl_module, trainer.optimizers, self._logdir, **options)
        self._shown_step = self.watch.step
        self._seen, self._waiting = {}, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Gradients are complete, and about to be clipped."""
        configured = type(pl_module).configure_gradient_clipping
        by_norm = trainer.gradient_clip_algorithm != "value"
        clips = (
            trainer.gradient_clip_val
            and configured is pl.LightningModule.configure_gradient_clipping
        )
        if self.watch is not None and clips and by_norm:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.watch.before_clipping(parameters, float(trainer.gradient_clip_val))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """The batch before is over, with what was logged at its end, or that of its epoch."""
        self._show_rest(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """What has not been shown is not the validation's."""
        self._show_rest(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """A batch is done, and a step with it unless it accumulates."""
        self._waiting.append(shown(self._new(trainer), trainer.callback_metrics))
        if self.watch is not None and self.watch.step != self._shown_step:
            self._shown_step = self.watch.step
            for values in self._waiting:
                self.watch.log(values)
            self._waiting = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A validation is done; it may be the sanity check's, or no part of a training."""
        if self.watch is not None:
            new = self._new(trainer)
            self.watch.log(shown(new, trainer.callback_metrics, evaluated=True))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """All steps are done."""
        self._show_rest(trainer)
        self._end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The training is over, if there was one."""
        self._end(exception)

    def _end(self, error: BaseException | None) -> None:
        if self.watch is not None:
            self._done = self.watch.step
            self.watch.__exit__(type(error) if error else None, error, None)

    def _show_rest(self, trainer: Any) -> None:
        rest = shown(self._new(trainer), trainer.callback_metrics)
        if self._waiting:
            self._waiting.append(rest)
        elif self.watch is not None:
            self.watch.log(rest)

    def _new(self, trainer: Any) -> dict[str, Tensor]:
        """What has been logged since this was asked last: Lightning keeps the older ones, too."""
        seen = self._seen
        new = {
            name: value
            for name, value in trainer.logged_metrics.items()
            if name not in seen or value.data_ptr() != seen[name].data_ptr()
        }
        seen.update(new)  # kept, so that no other value gets their memory
        return new


def shown(
    new: Mapping[str, Tensor], known: Container[str], *, evaluated: bool = False
) -> dict[str, Tensor]:
    """What is shown of a module's logs, by the names of `Watch.log`.

    Arguments:
        new: the Trainer's logged_metrics, those that are new.
        known: its callback_metrics, which tell a suffix of Lightning's from one of the user's.
        evaluated: whether a validation has logged them.
    """
    tags = {}
    for name, value in new.items():
        if evaluated and name not in known:
            continue  # of its last batch alone
        plain = (_BY_EPOCH if evaluated else _BY_STEP).sub("", name)
        tag = _STAGE.sub(r"\1/", plain if plain in known else name)
        tags[f"val/{tag}" if evaluated and not is_evaluation(tag) else tag] = value
    return tags
