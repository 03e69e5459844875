"""`pyvizllm.watch` for the Trainer of Hugging Face transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import (
    PretrainedConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pyvizllm.telemetry import Watch, watch

_LEFT_OUT = frozenset(("learning_rate", "epoch"))  # measured in each step; what steps tell


class WatchCallback(TrainerCallback):
    """Watches the model that a Trainer trains, from `train()` to its end.

    What the Trainer logs is shown as well, when it does (`logging_steps`): its mean loss, the norm
    that it clips as train/logged_grad_norm, and of each evaluation `eval_loss` as eval/loss. A
    training that goes on from a checkpoint goes on at its step.

    Arguments:
        logdir: folder of the run, as in `pyvizllm.watch`. A second `train()` goes on in it from
            its checkpoint, or begins anew, and hides what was there.
        options: all other keywords of `pyvizllm.watch`; the config is by default that of the
            training and its model.

    Raises:
        TypeError, ValueError, OSError: in `train()`, what `pyvizllm.watch` says of an option.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[WatchCallback()])
        >>> trainer.train()
    """

    def __init__(self, logdir: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self._logdir, self._options = logdir, options
        self.watch: Watch | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The Trainer is about to make its first step."""
        self._close()  # of a training that has raised
        model: nn.Module = kwargs["model"]
        config = {"training": args.to_dict()}
        if isinstance(of_model := getattr(model, "config", None), PretrainedConfig):
            config["model"] = of_model.to_dict()
        options = {"config": config, "start_step": state.global_step, **self._options}
        # No optimizer is named: the Trainer's is wrapped, and need not be there yet.
        self.watch = watch(model, None, self._logdir, **options)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The Trainer logs numbers of the steps since it logged last, or of an evaluation."""
        if self.watch is not None:
            self.watch.log(shown(logs or {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All steps are done."""
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()


def shown(logs: Mapping[str, Any]) -> dict[str, float]:
    """What is shown of a Trainer's logs: numbers, without those of the training as a whole."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else name: float(value)
        for name, value in logs.items()
        if isinstance(value, (int, float))
        and name not in _LEFT_OUT
        and not name.startswith(("train_", "total_"))
    }
