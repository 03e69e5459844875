"""What a model's parameters are called, and which of them are watched."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

Patterns = str | Sequence[str] | None

# What torch.compile, FSDP and activation checkpointing put into the names of those they wrap.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_name(name: str) -> str:
    """The name that a parameter has in the model as it was written.

    Example:
        >>> clean_name("module._orig_mod.head.weight")
        'head.weight'
    """
    return _WRAPPERS.sub("", name).removeprefix("module.")


def watched_names(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> dict[Tensor, str]:
    """Parameters and their names, in the model's order; a tied one once, by its first name.

    Arguments:
        include: regular expressions, at least one of which is to be found in a name; None for all.
        exclude: regular expressions, none of which is to be found in a name.
    Raises:
        ValueError: a pattern that is no regular expression, or patterns that leave nothing over.
    """
    wanted, unwanted = _compiled("include", include), _compiled("exclude", exclude)
    names: dict[Tensor, str] = {}  # parameters hash by identity
    for raw, parameter in model.named_parameters():
        name = clean_name(raw)
        kept = include is None or any(pattern.search(name) for pattern in wanted)
        if kept and not any(pattern.search(name) for pattern in unwanted):
            names[parameter] = name
    if not names and any(True for _ in model.parameters()):
        raise ValueError(
            f"watch: expected include and exclude to leave a parameter over, got "
            f"include={include!r} and exclude={exclude!r}, which leave none"
        )
    return names


def _compiled(argument: str, patterns: Patterns) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"watch: expected {argument} to hold regular expressions, got {pattern!r}: {error}"
            ) from error
    return compiled
