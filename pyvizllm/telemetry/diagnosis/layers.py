"""The layers of a model in the order of their depth, and the gradient of each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pyvizllm.telemetry.diagnosis.columns import measured, median
from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import Flags, Floats

WINDOW = 32
LEAST = 10
"""Measured steps before anything is said."""
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


def gradient_by_depth(history: History, matrices: Flags) -> tuple[list[str], Floats] | None:
    """Layers from input to output, and log10 of the root mean square of their weights' gradients
    [L], as medians over the last steps; None where there are too few of either."""
    squares = history.statistic("grad", "sum_squares", WINDOW)
    # One that is exactly zero has not vanished by degrees: it is dead, which another rule reports.
    alive = (measured(squares) >= LEAST) & (median(squares) > 0)
    columns = np.flatnonzero(matrices & alive)
    layers = layers_by_depth([history.names[int(column)] for column in columns])
    if len(layers) < MIN_LAYERS:
        return None
    # Blocks have no place for a head: only what is in a layer counts.
    columns = columns[[position for _, group in layers for position in group]]
    layer_of = np.repeat(np.arange(len(layers)), [len(group) for _, group in layers])
    numel = history.statistic("grad", "numel", WINDOW)[:, columns]
    sizes = median(numel)
    totals = median(squares[:, columns] / numel) * sizes
    mean_squares = np.bincount(layer_of, totals) / np.bincount(layer_of, sizes)
    return [layer for layer, _ in layers], 0.5 * np.log10(mean_squares)
