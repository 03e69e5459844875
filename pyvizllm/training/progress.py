"""What the terminal shows, fed by the publisher's thread: no device value is read for it."""

import contextlib
import sys
from typing import Any, TextIO

from tqdm import tqdm

from pyvizllm.telemetry import Publication
from pyvizllm.telemetry.diagnosis import RANKS
from pyvizllm.telemetry.terminal import finding_line, takes_colours

__all__ = ["ProgressBar"]


class ProgressBar:
    """A tqdm bar: its position moves with every step, its values with every publication."""

    def __init__(self, start_step: int, total_steps: int | None) -> None:
        self.terminal = None if sys.stderr is None else _Unfailing(sys.stderr)
        self._coloured = takes_colours(self._is_terminal())
        self.bar = tqdm(
            file=self.terminal,
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            # Into a file or a pipe every refresh is a line of its own: fewer of them.
            mininterval=0.1 if self._is_terminal() else 10.0,
            disable=self.terminal is None,  # stderr was closed before Python started
        )

    def _is_terminal(self) -> bool:
        return self.terminal is not None and self.terminal.isatty()

    def advance(self) -> None:
        """One more step is done (called on the training thread)."""
        self.bar.update(1)

    def write(self, publication: Publication) -> None:
        """Show the values of a publication, and what is wrong (called on the publisher's thread).

        What is only noted is left to TensorBoard and the doctor.
        """
        scalars = publication.scalars
        shown = {}
        if "train/loss" in scalars:
            shown["loss"] = f"{scalars['train/loss']:.4f}"
        if "train/tokens_per_second" in scalars:
            shown["tokens/s"] = f"{scalars['train/tokens_per_second']:,.0f}"
        if "eval/loss" in scalars:
            self._line(f"step {publication.step}: eval loss {scalars['eval/loss']:.4f}")
        for finding in publication.findings:
            if RANKS[finding.severity] >= RANKS["warning"]:
                self._line(finding_line(finding, coloured=self._coloured))
        if shown:
            self.bar.set_postfix(shown, refresh=self._is_terminal())

    def _line(self, text: str) -> None:
        """Write a line above the bar."""
        if self.terminal is not None:
            self.bar.write(text, file=self.terminal)

    def flush(self) -> None:
        """Nothing is buffered: a publication is shown when it is written."""

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        self.bar.close()


class _Unfailing:
    """A stream that nothing is raised from once its reader has gone or somebody has closed it.

    tqdm calls it on the training thread, and does not release its lock when it raises.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
