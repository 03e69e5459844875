"""The run in the terminal: one short line a publication, and what is wrong with it."""

import os
import sys
from typing import TextIO

from pyvizllm.telemetry.records import Finding, Publication

_SHOWN = (  # tag, and how it is written
    ("train/loss", "loss {:.4f}"),
    ("eval/loss", "eval loss {:.4f}"),
    ("train/grad_norm", "grad norm {:.3g}"),
    ("train/tokens_per_second", "{:,.0f} tokens/s"),
    ("train/steps_per_second", "{:.3g} steps/s"),
)
_COLOURS = {"info": "36", "warning": "33", "serious": "31"}


def printable(text: str) -> str:
    """`text` with escapes such as \\x1b for all that is no character, but for ends of lines.

    What others wrote must not move the cursor, colour the terminal or be no UTF-8.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def finding_line(finding: Finding, *, coloured: bool = False) -> str:
    """`serious (step 107, non_finite): the loss was nan. Look at ...`"""
    title = f"{finding.severity} (step {finding.step}, {finding.rule})"
    if coloured:
        title = f"\033[{_COLOURS[finding.severity]}m{title}\033[0m"
    return f"{title}: {printable(finding.text)}"


def takes_colours(is_terminal: bool) -> bool:
    """Whether a stream is a terminal, and the environment variable NO_COLOR is not set."""
    return is_terminal and not os.environ.get("NO_COLOR")


class TerminalSink:
    """Writes `step 50  loss 3.2140  grad norm 1.02  12,345 tokens/s`, and every finding.

    Arguments:
        stream: where to; `sys.stderr` if None. Colours only on a terminal, and not where the
            environment variable NO_COLOR is set.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._coloured = takes_colours(self._stream is not None and self._stream.isatty())

    @property
    def is_live(self) -> bool:
        """Whether somebody may be looking: it is the program's stderr, or a terminal."""
        return self._stream is not None and (self._stream is sys.stderr or self._stream.isatty())

    def write(self, publication: Publication) -> None:
        scalars = publication.scalars
        shown = [form.format(scalars[tag]) for tag, form in _SHOWN if tag in scalars]
        lines = ["  ".join((f"step {publication.step}", *shown))] if shown else []
        lines += [finding_line(f, coloured=self._coloured) for f in publication.findings]
        if lines and self._stream is not None:  # None: closed before Python started
            self._stream.write("\n".join(lines) + "\n")

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def close(self) -> None:
        """Flush; the stream stays open, it is its owner's."""
        self.flush()
