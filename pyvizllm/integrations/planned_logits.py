"""Logits that are not computed yet, for the way from a model's output layer to its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyvizllm.ops.cross_entropy import cross_entropy
from pyvizllm.ops.cross_entropy_arguments import (
    Reduction,
    is_autocast_on,
    torch_cross_entropy,
)
from pyvizllm.ops.linear_cross_entropy import wide_linear_cross_entropy

_Number = float  # `Logits` has a method of that name


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the logits come from: a linear layer and its input, or logits that were computed."""

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def classes(self) -> int:
        return self.input.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        device = self.input.device.type
        if self.weight is not None and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.input.dtype

    def logits(self) -> Tensor:
        if self.weight is None:
            return self.input
        return nn.functional.linear(self.input, self.weight, self.bias)

    def versions(self) -> list[int | None]:
        """How often each tensor was written to, where that is counted: a compiler does not."""
        if torch.compiler.is_compiling():
            return []
        tensors = (t for t in (self.input, self.weight, self.bias) if t is not None)
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


@dataclasses.dataclass(eq=False)
class Logits:
    """Logits on their way to a loss: `outer * tanh(scale * layer)`, or `scale * layer`.

    Has the part of a tensor's interface that language models use there. Whatever else is asked of
    them computes the tensor, which they are from then on: what is written to it, or to a view of
    it, is not lost.
    """

    layer: Layer
    shape: torch.Size
    dtype: torch.dtype
    scale: _Number = 1.0
    outer: _Number | None = None  # of the tanh, if there is one
    view_of: tuple[Logits, Callable[[Tensor], Tensor]] | None = None

    def __post_init__(self) -> None:
        self._versions = self.layer.versions()

    @property
    def device(self) -> torch.device:
        return self.layer.input.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def tensor(self) -> Tensor:
        """Computes them, once."""
        if self.view_of is not None:
            base, take = self.view_of
            self._become(take(base.tensor()))
        elif not self._is_computed():
            self._check()
            values = self.layer.logits()
            if self.scale != 1:
                values = values * self.scale
            if self.outer is not None:
                values = values.tanh() * self.outer
            self._become(values.to(self.dtype).reshape(self.shape))
        return self.layer.input

    def _become(self, values: Tensor) -> None:
        self.layer, self.scale, self.outer, self.view_of = Layer(values), 1.0, None, None

    def _is_computed(self) -> bool:
        plain = self.layer.weight is None and self.scale == 1 and self.outer is None
        values = self.layer.input
        return plain and (values.dtype, values.shape) == (self.dtype, self.shape)

    def _check(self) -> None:
        """A view of logits that are computed by now becomes one of that tensor.

        Else what they are made of has to be as it was.
        """
        if self.view_of is not None:
            base, _ = self.view_of
            base._check()
            if base._is_computed():
                self.tensor()
        versions = self.layer.versions()
        known = versions and self._versions
        if known and versions != self._versions and not self._is_computed():
            raise RuntimeError(
                "patch: expected hidden states, output layer and logits as they were when the loss "
                "asks for what was made of them, got one that was written to since (remove() the "
                "patch of such a model)"
            )

    def _copy(self, **changes: Any) -> Logits:
        self._check()
        copy = dataclasses.replace(self, view_of=None, **changes)
        if copy._is_computed():
            copy._become(self.tensor().clone())
        return copy

    def float(self) -> Logits:
        return self if self.dtype == torch.float32 else self._copy(dtype=torch.float32)

    def contiguous(self) -> Logits:
        return self if self.view_of is None else self._copy()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = (*args, *kwargs.values())
        if wanted and all(value in (self.device, self.dtype) for value in wanted):
            return self
        if wanted == (torch.float32,):
            return self.float()
        return self.tensor().to(*args, **kwargs)

    def view(self, *shape: Any, **named: Any) -> Any:
        return self._shaped("view", shape, named)

    def reshape(self, *shape: Any, **named: Any) -> Any:
        return self._shaped("reshape", shape, named)

    def _shaped(self, method: str, shape: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Planned where the tokens become one dimension."""
        self._check()
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        tokens = self.shape[:-1].numel()
        if named or len(sizes) != 2 or sizes[0] not in (-1, tokens) or sizes[1] != self.shape[-1]:
            return getattr(self.tensor(), method)(*shape, **named)
        rows = torch.Size((tokens, self.shape[-1]))
        view_of = (self, lambda tensor: getattr(tensor, method)(rows))
        return dataclasses.replace(self, shape=rows, view_of=view_of)

    def __getitem__(self, index: Any) -> Any:
        """Planned where tokens are chosen: `logits[..., :-1, :]`, `logits[:, 1:]`."""
        self._check()
        places = index if isinstance(index, tuple) else (index,)
        sliced = bool(places) and all(isinstance(i, slice) or i is ... for i in places)
        is_input = self.layer.input.shape[:-1] == self.shape[:-1]
        if not (sliced and is_input and self._are_classes_whole(places)):
            return self.tensor()[index]
        layer = dataclasses.replace(self.layer, input=self.layer.input[index])
        shape = torch.Size((*layer.input.shape[:-1], self.shape[-1]))
        view_of = (self, lambda tensor: tensor[index])
        return dataclasses.replace(self, layer=layer, shape=shape, view_of=view_of)

    def _are_classes_whole(self, places: tuple[Any, ...]) -> bool:
        if Ellipsis not in places and len(places) < len(self.shape):
            return True
        return places[-1] is not ... and places[-1] == slice(None)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor()[index] = value

    def __add__(self, other: Any) -> Any:
        """Of a bias, as BART's, that is no part of its layer."""
        layer, classes = self.layer, self.shape[-1:]
        plain = layer.weight is not None and self.scale == 1 and self.outer is None
        plain = plain and self.dtype == layer.input.dtype == getattr(other, "dtype", None)
        of_classes = isinstance(other, Tensor) and other.shape[-1:] == classes
        if plain and of_classes and other.numel() == classes.numel():
            bias = other.reshape(-1)
            bias = bias if layer.bias is None else layer.bias + bias
            return self._copy(layer=dataclasses.replace(layer, bias=bias))
        return self.tensor() + other

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, (int, float)):
            return self.tensor() * factor
        if self.outer is None:
            return self._copy(scale=self.scale * factor)
        return self._copy(outer=self.outer * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        usual = isinstance(divisor, (int, float)) and divisor != 0
        return self * (1 / divisor) if usual else self.tensor() / divisor

    def tanh(self) -> Any:
        if self.outer is not None:
            return self.tensor().tanh()
        return self._copy(outer=1.0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.tanh and not kwargs:
            return args[0].tanh()
        if function is torch_cross_entropy and isinstance(args[0], cls):
            loss = args[0]._loss(*args[1:], **kwargs)
            if loss is not None:
                return loss
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda logits: logits.tensor(), (args, kwargs)
        )
        return function(*args, **kwargs)

    def _loss(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: _Number = 0.0,
    ) -> Tensor | None:
        """None where this is left to torch: old arguments, classes that are no last dimension."""
        self._check()
        old = size_average is not None or reduce is not None
        softcap = 0.0 if self.outer is None else self.outer
        capped_by_0 = self.outer is not None and not softcap > 0
        if old or len(self.shape) != 2 or capped_by_0 or reduction not in ("mean", "sum", "none"):
            return None
        logit_scale = self.scale * softcap if softcap > 0 else self.scale
        layer = self.layer
        input = layer.input.reshape(-1, layer.input.shape[-1])
        if layer.weight is None:
            loss = cross_entropy(
                input.to(self.dtype),
                target,
                weight,
                ignore_index,
                reduction,
                label_smoothing,
                softcap=softcap,
                logit_scale=logit_scale,
                fused=self.dtype != torch.float16,  # whose gradients wait for the loss scale
            )
        else:
            options = (ignore_index, label_smoothing, 0.0, softcap, logit_scale)
            loss, _ = wide_linear_cross_entropy(
                input, layer.weight, target, layer.bias, weight, options, reduction
            )
        autocast = is_autocast_on(self.device) and self.dtype.itemsize == 2
        return loss.to(torch.float32 if autocast else self.dtype)


def _computed(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor(), name)(*others)


def _written(name: str) -> Callable[..., Any]:
    def operation(self: Logits, other: Any) -> Logits:
        getattr(self.tensor(), name)(other)
        return self

    return operation


# What Python looks up in the class and not in the object.
for _operation in ("sub", "pow", "matmul", "floordiv", "mod"):
    for _name in (f"__{_operation}__", f"__r{_operation}__"):
        setattr(Logits, _name, _computed(_name))
for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(Logits, f"__{_name}__", _written(f"__{_name}__"))
for _name in ("neg", "abs", "invert", "rtruediv", "len", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Logits, f"__{_name}__", _computed(f"__{_name}__"))
