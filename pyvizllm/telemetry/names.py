"""What a model's parameters are called, and which of them are watched."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from pyvizllm.telemetry.summary import clean_tag

Patterns = str | Sequence[str] | None

# What torch.compile, FSDP and activation checkpointing put into the names of those they wrap.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DATA_PARALLEL = "module."


class WatchedNames(Mapping[Tensor, str]):
    """The watched parameters of a model and their names, in the model's order.

    A tied parameter is there once, by its first name. The model is not kept alive.

    Arguments:
        model: whose parameters are watched.
        include: regular expressions, at least one of which is to be found in a name; None for all.
        exclude: regular expressions, none of which is to be found in a name.
        operation: who is called, for errors.

    Raises:
        ValueError: a pattern that is no regular expression, or patterns that leave nothing over.
    """

    def __init__(
        self,
        model: nn.Module,
        include: Patterns = None,
        exclude: Patterns = None,
        operation: str = "watch",
    ) -> None:
        self._model = weakref.ref(model)
        self._wanted = (
            None if include is None else _compiled(f"{operation}: expected include", include)
        )
        self._unwanted = _compiled(f"{operation}: expected exclude", exclude)
        self._names: dict[Tensor, str] = {}  # parameters hash by identity
        self.refresh()
        if not self._names and any(True for _ in model.parameters()):
            raise ValueError(
                f"{operation}: expected include and exclude to leave a parameter over, got "
                f"include={include!r} and exclude={exclude!r}, which leave none"
            )

    def refresh(self) -> None:
        """Take note of parameters that the model has got, or has had replaced."""
        model = self._model()
        if model is None:
            return
        self._names = {}
        tags: set[str] = set()
        for parameter, name in _clean_names(model):
            kept = self._wanted is None or any(pattern.search(name) for pattern in self._wanted)
            if kept and not any(pattern.search(name) for pattern in self._unwanted):
                self._names[parameter] = distinct(name, tags)

    def __getitem__(self, parameter: Tensor) -> str:
        return self._names[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _clean_names(model: nn.Module) -> list[tuple[Tensor, str]]:
    """Parameters with the names that they have in the model as it was written."""
    named: list[tuple[Tensor, str]]
    # Names may be any text, half of a character too, which no file could hold.
    named = [
        (p, _WRAPPERS.sub("", name.encode(errors="backslashreplace").decode()))
        for name, p in model.named_parameters()
    ]
    # DistributedDataParallel's only child; a model's own child of that name is one of several.
    while named and all(name.startswith(_DATA_PARALLEL) for _, name in named):
        named = [(p, name.removeprefix(_DATA_PARALLEL)) for p, name in named]
    return named


def distinct(name: str, tags: set[str]) -> str:
    """`name`, numbered where TensorBoard would write it as one of `tags`: "a b" and "a_b"."""
    number, numbered = 1, name
    while clean_tag(numbered) in tags:
        number += 1
        numbered = f"{name}_{number}"
    tags.add(clean_tag(numbered))
    return numbered


def _compiled(expected: str, patterns: Patterns) -> list[re.Pattern[str]]:
    if patterns is None:
        return []
    if not isinstance(patterns, Iterable):
        raise TypeError(
            f"{expected} to be a regular expression or a list of them, got {patterns!r}"
        )
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{expected} to hold regular expressions, got {pattern!r}: {error}"
            ) from error
    return compiled
