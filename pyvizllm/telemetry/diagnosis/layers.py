"""The layers of a model in the order of their depth, read from the parameters' names."""

from __future__ import annotations

import re
from collections.abc import Sequence

MIN_LAYERS = 4
"""Fewer show no trend over depth."""

_INDEXED = re.compile(r"^(.*?\b)(\d+)(?=\.)")  # blocks.3.attention.weight -> "blocks.", "3"


def layers_by_depth(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """(layer, the positions of its parameters in `names`), from the input to the output.

    The blocks of the longest family of numbered modules ("blocks.0" ... "blocks.11"), where that
    has at least MIN_LAYERS members with parameters; otherwise every module with parameters, in
    the order of the names. `names` are those of the weights to be compared.
    """
    families: dict[str, dict[int, list[int]]] = {}
    modules: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        modules.setdefault(name.rpartition(".")[0] or name, []).append(position)
        if found := _INDEXED.match(name):
            blocks = families.setdefault(found[1], {})
            blocks.setdefault(int(found[2]), []).append(position)
    prefix = max(families, key=lambda prefix: len(families[prefix]), default="")
    blocks = families.get(prefix, {})
    if len(blocks) >= MIN_LAYERS:
        return [(f"{prefix}{index}", blocks[index]) for index in sorted(blocks)]
    return list(modules.items())
