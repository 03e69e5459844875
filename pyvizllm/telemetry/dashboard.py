"""The dashboard that TensorBoard opens with: charts of several tags each (custom scalars)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

Layout: TypeAlias = Mapping[str, Mapping[str, Sequence[str]]]
"""Category -> chart -> regular expressions of tags."""

LAYOUT: Layout = {
    "Training": {
        "loss": ["train/loss", "eval/loss"],
        "accuracy": ["train/accuracy", "eval/accuracy"],
        "learning rate": ["train/learning_rate"],
        "tokens per second": ["train/tokens_per_second"],
        "steps per second": ["train/steps_per_second"],
        "entropy of the predictions, nats": ["train/entropy", "eval/entropy"],
    },
    "Gradients and updates": {
        "gradient norm": ["train/grad_norm", "train/grad_norm_max"],
        "gradient norm by layer": ["layer_grad_norm/.*"],
        "update-to-weight ratio by layer": ["layer_update_ratio/.*"],
        "share of steps clipped": ["train/clipped"],
        "gradient noise scale": ["noise/scale"],
    },
    "Health": {
        "NaN and Inf in gradients": ["health/nans", "health/infs"],
        "share of zeros in gradients": ["health/zeros"],
        "skipped steps": ["health/skipped_steps"],
    },
    "Trajectory": {
        "distance from the start, path length": ["trajectory/distance", "trajectory/path_length"],
        "cosine of successive updates": ["trajectory/update_cosine"],
        "relative change by layer": ["moved/.*"],
    },
    "pyvizllm": {
        "telemetry overhead, %": ["pyvizllm/overhead_pct"],
        "dropped publications": ["pyvizllm/dropped"],
    },
}


class Dashboard:
    """Those charts of a layout that have something to show, by the tags that have come.

    TensorBoard draws an empty chart for one without, and shows the layout that was written last. A
    chart has all its tags from the beginning: equal charts of several runs become one there.

    Arguments:
        all_charts: of a run that is gone on with, whose first part may have had any of them.
    """

    def __init__(self, *, all_charts: bool = False) -> None:
        self._all_charts = all_charts
        self._layout: Layout = {}
        self._tags: set[str] = set()
        self._found: set[str] = set()  # the regular expressions that match one of them
        self._shown: Layout = {}

    def add(self, layout: Layout | None, tags: Collection[str]) -> Layout | None:
        """What is to be shown now, where that has changed.

        Arguments:
            layout: all charts that there can be from now on; None for those of before.
            tags: of which there is something to show by now.
        """
        new = set(tags) - self._tags
        if layout is None and not new:
            return None
        self._tags |= new
        if layout is not None:
            self._layout, new = layout, self._tags
            self._found.clear()
        patterns = {p for charts in self._layout.values() for some in charts.values() for p in some}
        # As TensorBoard matches: from the beginning on, not up to the end.
        missing = patterns - self._found
        self._found |= {p for p in missing if any(map(re.compile(p).match, new))}
        charts = {
            category: {title: some for title, some in charts.items() if self._has_any(some)}
            for category, charts in self._layout.items()
        }
        shown = {category: some for category, some in charts.items() if some}
        if shown == self._shown:
            return None
        self._shown = shown
        return shown

    def _has_any(self, patterns: Sequence[str]) -> bool:
        return self._all_charts or not self._found.isdisjoint(patterns)
