"""NaN and Inf: where they came first."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from pyvizllm.telemetry.diagnosis.rule import Run, Symptom
from pyvizllm.telemetry.history import step_losses
from pyvizllm.telemetry.records import Counts, Flags, Kind, MicroBatches, Severity, Steps

SHOWN_SAMPLES = 8


class NonFinite:
    """The first step with a NaN or an Inf, in the gradients, the weights or the loss.

    Backward reaches the last parameters first, and what it has spoilt spoils all before: of
    several bad gradients, the last one in the model's order was the first. A step that the
    optimizer skipped (GradScaler, skip_nonfinite) did no harm and is left to `skipped_steps`.
    """

    name: ClassVar[str] = "non_finite"
    lasting: ClassVar[bool] = False

    def look(self, run: Run) -> Symptom | None:
        steps = run.new
        skipped = np.zeros(len(steps), np.bool_) if steps.skipped is None else steps.skipped
        bad: dict[Kind, Flags] = {
            kind: bad_counts(steps, kind) > 0
            for kind in ("grad", "param")
            if kind in steps.statistics
        }
        rows = {kind: _first(flags.any(1) & ~skipped) for kind, flags in bad.items()}
        row = min((row for row in rows.values() if row >= 0), default=-1)
        bad_losses = _bad_loss(steps) & ~skipped
        bad_loss = _first(bad_losses)
        if row < 0 and bad_loss < 0:
            return self._of_counts(steps)
        if row < 0 or 0 <= bad_loss < row:
            return self._of_loss(steps, bad_loss)
        # The loss comes before the gradients, and those before the update.
        loss = f"the loss was already {_bad_value(steps, row)}, and " if bad_losses[row] else ""
        if rows.get("grad", -1) == row:
            return self._of_gradient(run, steps, row, bad["grad"], loss)
        return self._of_weight(run, row, bad["param"][row], loss)

    def _of_gradient(self, run: Run, steps: Steps, row: int, bad: Flags, loss: str) -> Symptom:
        column = int(np.flatnonzero(bad[row])[-1])
        name, count = steps.names[column], int(bad[row].sum())
        index = -1
        if steps.bad_index is not None and _first(bad[:, column]) == row:
            index = int(steps.bad_index[column])
        where = f" ({locate(run, name, index)})" if index >= 0 else ""
        message = f"{loss}the gradient of {name} was the first that was not finite{where}"
        if count > 1:
            message += f", of {count} that were not"
        batch, samples = micro_batch(steps.micro_batches, row)
        message += batch
        known = bool(np.isfinite(step_losses(steps)[row])) and not loss
        return _symptom(
            steps, row, message, not known, name=name, index=index, count=count, samples=samples
        )

    def _of_weight(self, run: Run, row: int, bad: Flags, loss: str) -> Symptom:
        steps, names, count = run.new, run.new.names, int(bad.sum())
        column = int(np.flatnonzero(bad)[0])
        rows = len(steps) - row
        before = run.history.statistic("param", "numel")[:-rows, column]
        if np.isfinite(before).any():  # it was measured, and then it was finite
            made = f"the update made {names[column]} not finite, from finite gradients"
        else:
            made = f"{names[column]} is not finite, though all gradients are"
        message = f"{loss}{made} ({count} of {len(names)} parameters)"
        symptom = _symptom(steps, row, message, bool(loss), name=names[column], count=count)
        if np.isfinite(before).any():
            return symptom
        first = "See how it was initialised or loaded: it may have been so from the start. "
        return replace(symptom, advice=first + symptom.advice)

    def _of_loss(self, steps: Steps, row: int) -> Symptom:
        batch, samples = micro_batch(steps.micro_batches, row)
        measured = "grad" in steps.statistics
        gradients = ", of gradients that were finite" if measured else ""
        message = f"the loss was {_bad_value(steps, row)}{gradients}{batch}"
        severity: Severity = "warning" if measured else "serious"
        return _symptom(steps, row, message, True, name="loss", samples=samples, severity=severity)

    def _of_counts(self, steps: Steps) -> Symptom | None:
        """From the totals that a run's history has, where each step's statistics are gone."""
        for tag in ("health/nans", "health/infs"):
            count = steps.scalars.get(tag, np.zeros(1))
            if row := _first(count > 0) + 1:
                step = steps.first + row - 1
                kind = tag.removeprefix("health/").replace("nans", "NaNs").replace("infs", "Infs")
                message = f"{count[row - 1]:.0f} {kind} in the gradients by step {step}"
                return _symptom(steps, row - 1, message, True)
        return None


def _symptom(
    steps: Steps,
    row: int,
    message: str,
    of_batch: bool,
    *,
    name: str = "",
    index: int = -1,
    count: int = 0,
    samples: str = "",
    severity: Severity = "serious",
) -> Symptom:
    """What went wrong in a row of the steps.

    Arguments:
        of_batch: whether the batch may have brought it: its loss was not finite, or is not known.
        name, index, count, samples: the evidence.
    """
    advice = (
        "Go back to a checkpoint from before; look for log(0), a division by 0, sqrt at 0, "
        "an overflow in float16, or a learning rate that is too high. "
        "AdamW(skip_nonfinite=True) leaves such a step out."
    )
    if of_batch:
        first = "Look at the inputs and targets of that batch first: one NaN or Inf is enough; "
        advice = f"{first}then at the weights, which the step before may have spoilt. {advice}"
    return Symptom(
        severity,
        message,
        advice,
        {"parameter": name, "flat_index": index, "parameters": count, "samples": samples},
        step=steps.first + row,
    )


def bad_counts(steps: Steps, kind: Kind) -> Counts:
    """[n, T]: NaNs and Infs of each tensor at each step."""
    counts = sum(steps.statistic(kind, name) for name in ("nans", "pos_infs", "neg_infs"))
    return np.where(steps.statistic(kind, "numel") > 0, counts, 0).astype(np.int64)


def locate(run: Run, name: str, index: int) -> str:
    """A flat index, and the index in each dimension where the shape is known."""
    info = run.options.parameters.get(name)
    if info is None or index >= np.prod(info.shape) or len(info.shape) < 2:
        return f"flat index {index}"
    place = ", ".join(str(int(i)) for i in np.unravel_index(index, info.shape))
    return f"flat index {index} = [{place}]"


def micro_batch(batches: MicroBatches | None, row: int) -> tuple[str, str]:
    """What is known of the micro-batch that was the first to go bad: a clause, and its samples."""
    if batches is None:
        return "", ""
    seen = batches.seen[row]
    bad_loss = seen & ~np.isfinite(batches.losses[row])
    losses_given = (seen & ~np.isnan(batches.losses[row])).any()
    bad_norm = seen & ~np.isfinite(batches.squared_norms[row])
    if losses_given and bad_loss.any():
        number = _first(bad_loss)
        text = f"; the loss of micro-batch {number} was {batches.losses[row, number]}"
    elif bad_norm.any():
        number = _first(bad_norm)
        text = f"; it came with micro-batch {number}"
        if losses_given:
            text += f", whose loss was {batches.losses[row, number]:.4g}"
    else:
        return "", ""
    if seen.sum() == 1 and not np.isfinite(batches.losses[row, number]):
        text = ""  # of the only one, which is the step itself
    samples = flat_samples(batches.sample_ids[row][number]) if batches.sample_ids else []
    shown = ", ".join(map(str, samples[:SHOWN_SAMPLES]))
    if shown:
        text += f"; samples {shown}{', ...' if len(samples) > SHOWN_SAMPLES else ''}"
    return text, shown


def flat_samples(ids: object) -> list[object]:
    """What a loader said of a batch, as a list of hashable ids."""
    if ids is None:
        return []
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, (list, tuple)):
        return [sample for part in ids for sample in flat_samples(part)]
    return [ids if isinstance(ids, (int, str)) else repr(ids)]


def _bad_loss(steps: Steps) -> Flags:
    """[n]: whether the loss was not finite; a NaN only where one was given."""
    losses = step_losses(steps)
    given = steps.logged.get("train/loss", np.zeros(len(steps), np.bool_))
    if steps.metrics is not None:
        given = given | (steps.metrics[:, 0] > 0)
    bad = np.isinf(losses) | (np.isnan(losses) & given)
    if steps.micro_batches is not None:
        batches, seen = steps.micro_batches.losses, steps.micro_batches.seen
        some = np.any(seen & ~np.isnan(batches))
        bad = bad | np.any(seen & (np.isinf(batches) | (np.isnan(batches) & some)), axis=1)
    return bad


def _bad_value(steps: Steps, row: int) -> float:
    """The loss of a step in which it was not finite: its own, or else that of a micro-batch."""
    value = float(step_losses(steps)[row])
    if np.isfinite(value) and steps.micro_batches is not None:
        losses, seen = steps.micro_batches.losses[row], steps.micro_batches.seen[row]
        value = float(losses[seen & ~np.isfinite(losses)][0])
    return value


def _first(flags: Flags) -> int:
    """Position of the first True of [n]; -1 where there is none."""
    return int(np.argmax(flags)) if flags.any() else -1
