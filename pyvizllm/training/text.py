"""Text as bytes: a file, a folder, or Python's own standard library, cut into windows.

A byte is a token (256 of them): any language and any file works, and no vocabulary is downloaded.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCAB_SIZE = 256
EVAL_SHARE = 10
"""One byte in this many is for evaluation."""

# Tests repeat themselves, site-packages differ between machines, the last two are tables, not code.
_STANDARD_LIBRARY_SKIPS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data")
)
_PROBE_BYTES = 8192


class TextDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text: item i is (inputs [T], targets [T]), int64, targets one byte ahead.

    The windows are back to back and share no target: one pass over the data set predicts each
    byte once. The last tenth of the text is the `eval` split, everything before it the `train`
    split; no byte is in both. The split is kept in memory as it is, one byte a token.

    Args:
        path: a text file; or a folder, whose text files are read in the order of their paths,
            without hidden files and folders (a leading dot), links to folders, and binaries (a zero
            byte in the first 8 KiB); or None for the `.py` files of Python's standard library.
        block_size: T, in bytes.
        split: which part of the text.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        OSError: a file cannot be read.
        ValueError: the text is binary, empty, or too short for one window in each split.

    Example:
        >>> inputs, targets = TextDataset(block_size=128, split="train")[0]
    """

    def __init__(
        self, path: str | Path | None = None, *, block_size: int, split: Literal["train", "eval"]
    ) -> None:
        if block_size < 1:
            raise ValueError(f"TextDataset: expected block_size of at least 1, got {block_size}")
        if split not in ("train", "eval"):
            raise ValueError(f"TextDataset: expected split 'train' or 'eval', got {split!r}")
        text = _read(path)
        cut = len(text) - len(text) // EVAL_SHARE
        if len(text) - cut <= block_size:  # the eval split, always the shorter one
            raise ValueError(
                f"TextDataset: expected at least {(block_size + 1) * EVAL_SHARE} bytes of text for "
                f"windows of {block_size} in both splits, got {len(text)} bytes in {_name(path)}"
            )
        part = text[:cut] if split == "train" else text[cut:]
        self.block_size = block_size
        self.tokens = torch.frombuffer(part, dtype=torch.uint8)  # [bytes]

    def __len__(self) -> int:
        # The last window also needs one byte more than it reads, as its last target.
        return (self.tokens.numel() - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"TextDataset: expected an index below {len(self)}, got {index}")
        start = (index % len(self)) * self.block_size
        window = self.tokens[start : start + self.block_size + 1].long()
        return window[:-1], window[1:]


def encode(text: str) -> Tensor:
    """A string as tokens, [bytes of its UTF-8] int64."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def decode(tokens: Tensor | Iterable[int]) -> str:
    """Tokens (a tensor [T] or numbers, 0..255) as a string; what is not UTF-8 becomes U+FFFD."""
    values = tokens.tolist() if isinstance(tokens, Tensor) else tokens  # sync point
    return bytes(values).decode(errors="replace")


def _read(path: str | Path | None) -> bytearray:
    """The whole text behind `path`."""
    if path is None:
        return _concatenate(_standard_library())
    path = Path(path)
    if path.is_dir():
        text = _concatenate(_visible_files(path))
        if not text:
            raise ValueError(
                f"TextDataset: expected some text, got {path}, in which no text file is"
            )
        return text
    if not path.exists():
        raise FileNotFoundError(
            f"TextDataset: expected a text file or a folder, got {path}, which does not exist"
        )
    text = bytearray(path.read_bytes())
    if _is_binary(text):
        raise ValueError(f"TextDataset: expected a text file, got {path}, which is binary")
    if not text:
        raise ValueError(f"TextDataset: expected some text, got {path}, which is empty")
    return text


def _concatenate(files: Iterable[Path]) -> bytearray:
    text = bytearray()
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(_PROBE_BYTES)
            if not _is_binary(head):
                text += head
                text += stream.read()
    return text


def _visible_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in _walk(folder, skip=frozenset())
        if not file.name.startswith(".")
        and file.is_file()  # is_file: no broken links, sockets or pipes
    )


def _standard_library() -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata holds the compiler flags of this one build of Python.
    return sorted(
        file
        for file in _walk(folder, _STANDARD_LIBRARY_SKIPS)
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
    )


def _walk(folder: Path, skip: frozenset[str]) -> Iterator[Path]:
    """Every file below `folder`, but none in hidden folders, linked folders and those of `skip`."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        yield from (Path(parent, name) for name in files)


def _is_binary(text: bytes | bytearray) -> bool:
    """Git's rule: text has no zero byte in its first 8 KiB."""
    return 0 in text[:_PROBE_BYTES]


def _name(path: str | Path | None) -> str:
    return "Python's standard library" if path is None else str(path)
