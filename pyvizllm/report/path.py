"""The path of the parameters on its principal axes, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from pyvizllm.telemetry.records import Floats
from pyvizllm.telemetry.trajectory import apart, marks, on_plane, shares_text

_WIDTH, _HEIGHT, _MARGIN, _TOP = 480, 330, 32, 44
_CHARACTER, _LINE = 7.5, 12.0  # pixels of a label, at most


def path_figure(path: Floats, steps: Sequence[int]) -> str:
    """The path [P, 64] through the parameters of `steps` [P] as a figure of its main plane."""
    plane = on_plane(path, (_MARGIN, _TOP, _WIDTH - _MARGIN, _HEIGHT - _MARGIN))
    places = plane.places.tolist()  # numpy
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{points}" class="line" style="stroke:var(--c0)"/>']
    dots: list[str] = []
    texts, boxes = [], []
    last = len(places) - 1
    for index in marks(len(places)):
        x, y = places[index]
        colour = "--c2" if index == 0 else "--serious" if index == last else "--c0"
        radius = 5 if index in (0, last) else 2.5
        dot = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:var({colour})"'
        dots.insert(0, f"<circle {dot}/>")  # the ends lie upon the others
        text = f"{steps[index]:,}"
        width, right = _CHARACTER * len(text), x < _WIDTH - 80
        x += 8 if right else -8
        boxes.append((x if right else x - width, y - 5 - _LINE, x + width if right else x, y - 5))
        anchor = "" if right else " end"
        texts.append(f'<text x="{x:.1f}" y="{y - 5:.1f}" class="tick{anchor}">{text}</text>')
    parts += dots + [texts[label] for label in apart(boxes)]
    title = "Path of the parameters on its principal axes"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{title}"><text x="{_MARGIN}" y="17" class="title">{title}</text>'
        f'{"".join(parts)}</svg><figcaption class="legend">'
        f'<span><i style="background:var(--c2)"></i>step {steps[0]:,}</span>'
        f'<span><i style="background:var(--serious)"></i>step {steps[-1]:,}</span>'
        f"<span>{shares_text(plane.shares)}; extent {plane.extent:.3g}</span>"
        "</figcaption></figure>"
    )
