"""The heat map's pixels, read back from the picture, against the norms that they show."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from recorded_steps import steps_of

from pyvizllm.telemetry import heatmap
from pyvizllm.telemetry.assembler import Draft
from pyvizllm.telemetry.heatmap import HeatMap

NAMES = ("embedding.weight", "h.0.weight", "h.0.bias", "h.1.weight")
LEFT, TOP = 200, 36  # of the map within the picture, 24 pixels a row


def pixels_of(picture: heatmap.Picture) -> np.ndarray:
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == (picture.width, picture.height)
    return np.asarray(image.convert("RGB")).astype(int)


def gradients(*norms: float | None) -> list[np.ndarray | None]:
    return [None if norm is None else np.array([norm]) for norm in norms]


def test_brighter_is_larger_and_what_is_not_finite_stands_out() -> None:
    steps = [
        gradients(1e-3, 3.0, 4.0, 1.0),  # the layer h.0: 5
        gradients(1e-2, np.nan, 4.0, 10.0),
        gradients(1e-1, 0.0, 0.0, np.inf),
        gradients(None, 30.0, 40.0, 1.0),
    ]
    shown = HeatMap()
    shown.add(steps_of(1, NAMES, {"grad": steps}))
    pixels = pixels_of(shown.picture())
    centres = np.array(
        [
            [pixels[TOP + 24 * row + 12, LEFT + 128 * step + 64] for step in range(4)]
            for row in range(3)
        ]
    )
    light = centres.sum(axis=-1)
    assert light[0, 0] < light[0, 1] < light[0, 2] < light[2, 0] < light[1, 0] < light[1, 3]
    assert light[2, 0] == light[2, 3]  # the same norm
    assert tuple(centres[1, 1]) == tuple(centres[2, 2]) == (230, 30, 160)  # NaN, Inf
    assert tuple(centres[0, 3]) == tuple(centres[1, 2]) == (225, 225, 225)  # none, zero


def test_its_text_is_read_where_tensorboard_shows_it_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card is some 330 pixels wide: nothing is smaller there than 8 pixels, or cut off."""
    boxes: dict[str, tuple[float, float, float, float]] = {}
    write = ImageDraw.ImageDraw.text

    def text(self: Any, place: Any, string: str, **options: Any) -> None:
        boxes[string] = self.textbbox(place, string, options["font"], options["anchor"])
        assert options["font"].size * 330 / self.im.size[0] > 8
        write(self, place, string, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    norms = np.array([[1e-3, -1.0, 1e30], [np.nan, 5.0, 1.0]])
    labels = ("transformer.token_embeddings", "position_embedding", "h.00")
    picture = heatmap.draw_norms(norms, labels, ("step 1,000,001", "2,000,000"))
    wanted = {"….token_embeddings", "1e+30 (log scale)", "NaN or Inf", "none or zero"}
    assert boxes.keys() >= wanted | {"position_embedding", "h.00", "step 1,000,001", "2,000,000"}
    for left, top, right, bottom in boxes.values():
        assert 0 <= left <= right <= picture.width
        assert 0 <= top <= bottom <= picture.height


def test_nothing_measured_has_no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, place, string, **options: written.append(string)
    )
    heatmap.draw_norms(np.full((2, 1), -1.0), ("h",), ("step 1", "2"))
    assert [string for string in written if string] == [
        *("Gradient norm by layer", "h", "step 1", "2", "none or zero")
    ]


def test_a_spike_is_never_thinned_away() -> None:
    shown = HeatMap()
    spikes = (100, 1023, 2999)
    for begin in range(0, 3000, 50):
        steps = [
            gradients(*([1e3] if step in spikes else [1.0]), 1.0, 1.0, 1.0)
            for step in range(begin, begin + 50)
        ]
        shown.add(steps_of(begin + 1, NAMES, {"grad": steps}))
    assert 256 <= len(shown._columns) <= heatmap.COLUMNS
    assert (shown._columns[:, 0] == 1e3).sum() == len(spikes)
    assert shown._axis() == ("step 1", "3000")


def test_it_is_drawn_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(heatmap.time, "monotonic", lambda: now[0])
    shown, drawn = HeatMap(), []
    for seconds in (0, 1, 29, 31, 32):
        now[0] = 100.0 + seconds
        shown.add(steps_of(1, NAMES, {"grad": [gradients(1.0, 1.0, 1.0, 1.0)]}))
        draft = Draft(1, 0.0)
        shown.publish(draft)
        drawn.append(heatmap.TAG in draft.images)
    assert drawn == [True, False, False, True, False]


def test_a_layer_that_begins_to_train() -> None:
    shown = HeatMap()
    shown.add(steps_of(1, NAMES[:1], {"grad": [gradients(1.0)]}))
    shown.add(steps_of(2, NAMES, {"grad": [gradients(1.0, 3.0, 4.0, 2.0)]}))
    np.testing.assert_array_equal(shown._columns, [[1.0, -1.0, -1.0], [1.0, 5.0, 2.0]])
