"""Renders a results file as the README's table: python benchmarks/table.py FILE"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2f} ms"


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def render(result: dict[str, Any]) -> str:
    machine = result["machine"]
    rows = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}; "
        f"torch {machine['torch']}; {result['date']}; `{result['command']}`",
        "",
        "| case | ours | instead of | ratio (quartiles) | asked |",
        "|---|---|---|---|---|",
    ]
    for c in result["comparisons"]:
        rows.append(
            f"| {c['case']} | {c['ours']}: {_milliseconds(c['ours_ms'])} "
            f"| {c['other']}: {_milliseconds(c['other_ms'])} "
            f"| {_ratio(c['ratio'])} ({_ratio(c['ratio_low'])} to {_ratio(c['ratio_high'])}) "
            f"| {c['target']} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())))
