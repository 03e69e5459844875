"""The layers that parameters belong to, found in their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pyvizllm.telemetry.names import distinct
from pyvizllm.telemetry.records import Counts, Floats


def layer_of(name: str) -> str:
    """The layer of a parameter: its name up to the first number in it, or else its module.

    Example:
        >>> layer_of("transformer.h.11.attn.c_attn.weight")
        'transformer.h.11'
        >>> layer_of("token_embedding.weight"), layer_of("scale")
        ('token_embedding', 'scale')
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def layer_tags(layers: Sequence[str]) -> list[str]:
    """Names of layers for tags: numbers with leading zeros, since TensorBoard sorts by letters.

    No two are the same to TensorBoard, which writes "a b" as "a_b".

    Example:
        >>> layer_tags(["h.2", "h.10"])
        ['h.02', 'h.10']
    """
    width: dict[str, int] = {}
    split = [re.fullmatch(r"(.*\.)?(\d+)", layer) for layer in layers]
    for match in split:
        if match is not None:
            stem = match[1] or ""
            width[stem] = max(width.get(stem, 0), len(match[2]))
    tags: set[str] = set()
    return [
        distinct(
            layer if match is None else (match[1] or "") + match[2].zfill(width[match[1] or ""]),
            tags,
        )
        for layer, match in zip(layers, split, strict=True)
    ]


@dataclass(frozen=True)
class Layers:
    """T parameters and the L layers they belong to; layers in the order of their first one."""

    names: tuple[str, ...]  # [L]
    tags: tuple[str, ...]  # [L]
    index: Counts  # [T] the layer of each parameter
    order: Counts  # [T] parameters sorted by layer
    starts: Counts  # [L] where each layer begins in that order

    @classmethod
    def of(cls, names: Sequence[str], layer: Callable[[str], str] = layer_of) -> Layers:
        """Group the parameters `names` [T]."""
        numbers: dict[str, int] = {}
        index = np.array(
            [numbers.setdefault(layer(name), len(numbers)) for name in names], np.int64
        )
        order = np.argsort(index, kind="stable")
        starts = np.searchsorted(index[order], np.arange(len(numbers)))
        return cls(tuple(numbers), tuple(layer_tags(list(numbers))), index, order, starts)

    def sum(self, values: Floats) -> Floats:
        """[..., T] -> [..., L]: sums over the parameters of each layer."""
        if not self.names:
            return values[..., :0]
        total: Floats = np.add.reduceat(values[..., self.order], self.starts, axis=-1)
        return total
