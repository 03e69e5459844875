"""What the terminal shows, fed by the publisher's thread: no device value is read for it."""

import logging
import math
import sys

from tqdm import tqdm

from pyvizllm.telemetry import Publication

__all__ = ["NonFiniteWarning", "ProgressBar"]

_logger = logging.getLogger("pyvizllm")


class ProgressBar:
    """A tqdm bar: its position moves with every step, its values with every publication."""

    def __init__(self, start_step: int, total_steps: int | None) -> None:
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            # Into a file or a pipe every refresh is a line of its own: fewer of them.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def advance(self) -> None:
        """One more step is done (called on the training thread)."""
        self.bar.update(1)

    def write(self, publication: Publication) -> None:
        """Show the values of a publication (called on the publisher's thread)."""
        scalars = publication.scalars
        shown = {}
        if "train/loss" in scalars:
            shown["loss"] = f"{scalars['train/loss']:.4f}"
        if "train/tokens_per_second" in scalars:
            shown["tokens/s"] = f"{scalars['train/tokens_per_second']:,.0f}"
        if "eval/loss" in scalars:
            line = f"step {publication.step}: eval loss {scalars['eval/loss']:.4f}"
            self.bar.write(line, file=sys.stderr)
        if shown:
            self.bar.set_postfix(shown, refresh=sys.stderr.isatty())

    def flush(self) -> None:
        """Nothing is buffered: a publication is shown when it is written."""

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        self.bar.close()


class NonFiniteWarning:
    """Logs one warning, at the first publication with a NaN or Inf in the loss or the gradients."""

    def __init__(self) -> None:
        self.warned = False

    def write(self, publication: Publication) -> None:
        """Look at a publication (called on the publisher's thread)."""
        scalars = publication.scalars
        watched = ("train/loss", "train/grad_norm", "train/grad_norm_max")
        bad = [tag for tag in watched if not math.isfinite(scalars.get(tag, 0.0))]
        bad += [tag for tag in ("health/nans", "health/infs") if scalars.get(tag, 0.0) > 0]
        if bad and not self.warned:
            self.warned = True
            values = ", ".join(f"{tag} = {scalars[tag]:g}" for tag in bad)
            _logger.warning(
                "train: the loss or the gradients are not finite by step %d (%s); training goes on",
                publication.step,
                values,
            )

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Nothing to release."""
