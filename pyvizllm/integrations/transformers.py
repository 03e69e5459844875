"""A Hugging Face language model's loss, computed by pyvizllm.

The output layer of a patched model hands out logits that are not computed yet. What models do with
them on the way to the loss (a scale, a soft cap, float(), view()) is noted; when they arrive at
torch's cross_entropy, `linear_cross_entropy` is computed from the hidden states, chunk by chunk.
So the model's own forward and the model's own loss function run, with their shifts of labels and
their `num_items_in_batch`. Anything else that is asked of the logits computes them.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pyvizllm.integrations.planned_logits import Layer, Logits


def patch(model: nn.Module) -> Patch:
    """Makes a causal, masked or sequence-to-sequence language model compute its loss with pyvizllm.

    In training mode, where `labels` are given, the output's `logits` are then None, since they are
    never computed (return_dict=False: there is None in their place). Evaluation, generation and
    calls without labels are not changed. Where the output layer is no plain `nn.Linear` (of an
    adapter, quantized, sharded, with hooks), its logits are computed by it, and the loss is
    `pyvizllm.cross_entropy` of them; or torch's, where it has hooks of the backward. Hidden states
    that a model writes to between its output layer and its loss are refused; under torch.compile,
    which does not tell, they are not noticed.

    Args:
        model: has `get_output_embeddings()`, as every such model of transformers.

    Returns:
        A handle: `remove()` restores the model, as does the end of a `with` block.

    Raises:
        TypeError: where the model has no output layer.
        ValueError: where it is patched already.

    Example:
        >>> handle = patch(AutoModelForCausalLM.from_config(config))
        >>> trainer.train()
        >>> handle.remove()
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise TypeError(
            "patch: expected a language model with get_output_embeddings(), "
            f"got {type(model).__name__}, which has no output layer"
        )
    if isinstance(getattr(head.forward, "__self__", None), Patch):
        raise ValueError(
            "patch: expected a model that is not patched, got one that is: remove() its handle "
            "first"
        )
    return Patch(model, head)


class Patch:
    """What `patch` did to a model."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._head = head
        self._active = False
        self._signature = inspect.signature(model.forward)
        self._original = head.forward
        self._was_set = "forward" in vars(head)
        head.forward = self._forward
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Restores the model; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            if self._was_set:
                self._head.forward = self._original
            else:
                del self._head.forward
        self._hooks = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        labels = kwargs.get("labels", given.get("labels"))  # of a forward(*args, **kwargs) too
        self._active = model.training and labels is not None

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._active = False
        if isinstance(output, tuple):
            return tuple(None if isinstance(value, Logits) else value for value in output)
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            names = (field.name for field in dataclasses.fields(output))
            values = {name: getattr(output, name) for name in names}
            given = {name: v for name, v in values.items() if not isinstance(v, Logits)}
            return output if len(given) == len(values) else type(output)(**given)
        return output

    def _forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        head = self._head
        # Hooks of the backward want a tensor.
        if not self._active or head._backward_hooks or head._backward_pre_hooks:
            return self._original(input, *args, **kwargs)
        usual = not args and not kwargs and not self._was_set
        if usual and isinstance(head, nn.Linear) and _is_plain(head):
            layer = Layer(input, head.weight, head.bias)
        else:
            layer = Layer(self._original(input, *args, **kwargs))
        return Logits(layer, torch.Size((*input.shape[:-1], layer.classes)), layer.dtype)


def _is_plain(head: nn.Linear) -> bool:
    return (
        type(head) is nn.Linear
        and type(head.weight) in (Tensor, nn.Parameter)  # no shard, not quantized
        and not (head._forward_hooks or head._forward_pre_hooks)
    )
