"""Paths of known geometry through 20,000 parameters, seen through their sketches."""

import io
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pyvizllm.ops import sketch
from pyvizllm.telemetry.assembler import Draft
from pyvizllm.telemetry.trajectory import (
    PATH_TAG,
    POINT_TAG,
    POINTS,
    SAVE_SECONDS,
    START_TAG,
    Trajectory,
    apart,
    draw_path,
)

NAMES = tuple(f"h.{layer}.{name}" for layer in range(10) for name in ("weight", "bias"))
SIZES = (2000, 40) * 10
# The squared norm of a sketch of 20 tensors, 10 of which matter, is off by sqrt(2 / 640) = 5.6 %
# (one standard deviation), a norm by half of that. The seeds are fixed: three of them.
ERROR = 0.09


def positions(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]


def sketched(tensors: list[torch.Tensor]) -> np.ndarray:
    return sketch(tensors).numpy()


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))


def test_a_straight_line() -> None:
    start, direction = positions(0), positions(1)
    trajectory = Trajectory()
    for step in range(6):
        now = [a + 0.1 * step * b for a, b in zip(start, direction, strict=True)]
        scalars = trajectory.move(step, NAMES, sketched(now))
        assert step > 0 or scalars == {}
    assert scalars["trajectory/update_cosine"] == pytest.approx(1.0, abs=1e-9)
    assert scalars["trajectory/path_length"] == pytest.approx(scalars["trajectory/distance"])
    assert scalars["trajectory/distance"] == pytest.approx(0.5 * norm(direction), rel=ERROR)


def test_there_and_back_again() -> None:
    start, direction = positions(0), positions(1)
    there = [a + b for a, b in zip(start, direction, strict=True)]
    trajectory = Trajectory()
    for step, place in enumerate((start, there, start)):
        scalars = trajectory.move(step, NAMES, sketched(place))
    assert scalars["trajectory/distance"] == 0
    assert scalars["trajectory/update_cosine"] == pytest.approx(-1.0, abs=1e-9)
    assert scalars["trajectory/path_length"] == pytest.approx(2 * norm(direction), rel=ERROR)


def test_a_random_walk() -> None:
    place = positions(0)
    trajectory, cosines = Trajectory(), []
    for step in range(30):
        place = [a + b for a, b in zip(place, positions(100 + step), strict=True)]
        scalars = trajectory.move(step, NAMES, sketched(place))
        cosines.append(scalars.get("trajectory/update_cosine", 0.0))
    assert abs(np.mean(cosines)) < 0.05
    ratio = scalars["trajectory/path_length"] / scalars["trajectory/distance"]
    assert ratio == pytest.approx(math.sqrt(29), rel=2 * ERROR)


def test_which_layers_moved() -> None:
    start = positions(0)
    moved = [a.clone() for a in start]
    moved[6] += 0.25 * positions(7)[6]  # h.3.weight
    trajectory = Trajectory()
    trajectory.move(0, NAMES, sketched(start))
    scalars = trajectory.move(10, NAMES, sketched(moved))
    layers = {tag: value for tag, value in scalars.items() if tag.startswith("moved/")}
    assert len(layers) == 10
    assert layers.pop("moved/h.3") == pytest.approx(0.25, rel=0.25)  # of one tensor: 18 %, twice
    assert set(layers.values()) == {0.0}


def test_a_parameter_that_begins_to_train_starts_where_it_is() -> None:
    start = positions(0)
    trajectory = Trajectory()
    trajectory.move(0, NAMES[:2], sketched(start)[:2])
    scalars = trajectory.move(1, NAMES, sketched(start))
    assert scalars["trajectory/distance"] == 0
    assert scalars["trajectory/path_length"] == 0
    np.testing.assert_allclose(trajectory._path[0], trajectory._path[1], rtol=1e-12)


def test_what_is_not_seen_has_not_moved() -> None:
    start, direction = positions(0), positions(1)
    at = [
        sketched([a + 0.1 * n * b for a, b in zip(start, direction, strict=True)])
        for n in (0, 1, 2)
    ]
    late = [sketch.copy() for sketch in at]
    late[0][:6] = late[1][:6] = np.nan  # begins to train after the second publication
    late[2][18:] = np.nan  # trains no more
    trajectory = Trajectory()
    for step, seen in enumerate(late):
        scalars = trajectory.move(step, NAMES, seen)
    steps = [np.linalg.norm((at[1] - at[0])[6:]), np.linalg.norm((at[2] - at[1])[6:18])]
    assert scalars["trajectory/path_length"] == pytest.approx(sum(steps), rel=1e-12)
    way = np.concatenate(((at[2] - at[0])[6:18], (at[1] - at[0])[18:]))
    assert scalars["trajectory/distance"] == pytest.approx(np.linalg.norm(way), rel=1e-12)
    assert "moved/h.0" in scalars
    assert scalars["moved/h.0"] == 0


def test_what_is_published_and_drawn() -> None:
    start, direction = positions(0), positions(1)
    trajectory = Trajectory()
    for step in range(1, 4):
        now = [a + 0.1 * step * b for a, b in zip(start, direction, strict=True)]
        draft = Draft(step, 0.0, NAMES, sketched(now))
        trajectory.publish(draft)
        np.testing.assert_allclose(draft.arrays[POINT_TAG], sketched(now).sum(0), rtol=1e-12)
        assert START_TAG not in draft.arrays  # that is the first point
    picture = draft.images[PATH_TAG]
    image = Image.open(io.BytesIO(picture.png)).convert("RGB")
    assert image.size == (640, 460)
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(40, 140, 90), (200, 60, 50), (70, 104, 146)} <= colours  # start, end, path

    broken = Draft(4, 0.0, NAMES, np.full((20, 64), np.inf))
    trajectory.publish(broken)
    assert broken.scalars == {}


def test_where_the_path_starts_is_published_once() -> None:
    at = [sketched(positions(seed)) for seed in range(3)]
    trajectory = Trajectory()
    trajectory.move(7, NAMES, at[0])  # before the first step, which is the 8th
    drafts = [Draft(step, 0.0, NAMES, at[step - 9]) for step in (10, 11)]
    for draft in drafts:
        trajectory.publish(draft)
    step, *point = drafts[0].arrays[START_TAG]
    assert step == 7
    np.testing.assert_allclose(point, at[0].sum(0), rtol=1e-12)
    assert START_TAG not in drafts[1].arrays


def test_labels_of_a_path_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that crowd at the end: its label is shown, those that it would hide are not."""
    boxes: dict[str, tuple[float, float, float, float]] = {}
    write = ImageDraw.ImageDraw.text

    def text(self: Any, place: Any, string: str, **options: Any) -> None:
        if string.isdecimal():
            boxes[string] = self.textbbox(place, string, options["font"], options["anchor"])
        write(self, place, string, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    path = np.zeros((100, 64))
    path[:, 0] = np.minimum(np.arange(100.0), 50 + np.arange(100) / 1000)
    draw_path(path, list(range(100)))
    assert list(boxes) == ["99", "0", "12", "24", "37"]
    edges = sorted((box[0], box[2]) for box in boxes.values())
    assert all(right <= left for (_, right), (left, _) in pairwise(edges))


def test_apart() -> None:
    boxes = [(0, 0, 10, 10), (9, 9, 20, 20), (10, 0, 15, 10), (0, 10, 9, 20), (2, 2, 3, 3)]
    assert apart(boxes) == [0, 2, 3]  # the second would have hidden the fourth


def test_long_paths_are_thinned_and_keep_their_ends_and_length() -> None:
    trajectory = Trajectory()
    step_of = np.zeros((1, 64))
    step_of[0, 0] = 1.0
    for step in range(5000):
        scalars = trajectory.move(step, ("w",), step * step_of)
    assert POINTS / 2 <= len(trajectory._path) <= POINTS + 1
    assert trajectory._steps[0] == 0
    assert trajectory._steps[-1] == 4999
    assert np.array(trajectory._path)[:, 0].tolist() == trajectory._steps
    assert max(np.diff(trajectory._steps)) == 8
    assert scalars["trajectory/path_length"] == 4999


def test_a_resumed_run_goes_on_with_its_start_and_path(tmp_path: Path) -> None:
    start, direction = positions(0), positions(1)
    at = [
        sketched([a + 0.1 * step * b for a, b in zip(start, direction, strict=True)])
        for step in range(7)
    ]

    def publish(trajectory: Trajectory, step: int) -> Draft:
        draft = Draft(step, 0.0, NAMES, at[step])
        trajectory.publish(draft)
        return draft

    whole, first = Trajectory(), Trajectory(tmp_path)
    for trajectory in (whole, first):
        trajectory.move(0, NAMES, at[0])
        for step in range(1, 6):
            publish(trajectory, step)
    first.finish(Draft(5, 0.0, NAMES))
    expected = publish(whole, 6)

    resumed = Trajectory(tmp_path)  # from a checkpoint of step 4: step 5 comes again
    assert resumed.move(4, NAMES, at[4]) == {}
    publish(resumed, 5)
    got = publish(resumed, 6)
    for tag in ("trajectory/distance", "trajectory/path_length", "moved/h.3"):
        assert got.scalars[tag] == pytest.approx(expected.scalars[tag], rel=1e-12)
    assert resumed._steps == [0, 1, 2, 3, 4, 5, 6]

    fresh = Trajectory(tmp_path)  # another run in the same folder begins where it is
    assert fresh.move(0, NAMES, at[3]) == {}
    assert publish(fresh, 4).scalars["trajectory/distance"] == pytest.approx(
        float(np.linalg.norm(at[4] - at[3])), rel=1e-12
    )


def left_by(folder: Path) -> Path:
    """The file of a run of two publications."""
    trajectory = Trajectory(folder)
    for step in range(2):
        trajectory.publish(Draft(step, 0.0, NAMES, sketched(positions(step))))
    trajectory.finish(Draft(1, 0.0, NAMES))
    return folder / "trajectory.npz"


def test_the_path_is_saved_every_few_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("pyvizllm.telemetry.trajectory.time.monotonic", lambda: now)
    trajectory, saved = Trajectory(tmp_path), []

    def points() -> int:
        with np.load(tmp_path / "trajectory.npz") as left:
            return len(left["path"])

    for step in range(6):
        now = step * 0.4 * SAVE_SECONDS
        trajectory.publish(Draft(step, 0.0, NAMES, sketched(positions(step))))
        saved.append(points())
    assert saved == [1, 1, 1, 4, 4, 4]
    trajectory.finish(Draft(5, 0.0, NAMES))
    assert points() == 6


def deflated(folder: Path) -> bytes:
    """Compressed by somebody, and damaged within: zlib.error."""
    with np.load(left_by(folder)) as left:
        np.savez_compressed(folder / "deflated.npz", **left)
    data = bytearray((folder / "deflated.npz").read_bytes())
    data[60:90] = bytes(30)
    return bytes(data)


def changed(**arrays: object) -> Callable[[Path], bytes]:
    def bytes_of(folder: Path) -> bytes:
        with np.load(left_by(folder)) as left:
            np.savez(folder / "changed.npz", **{**left, **arrays})  # type: ignore[arg-type]
        return (folder / "changed.npz").read_bytes()

    return bytes_of


@pytest.mark.parametrize(
    "bytes_of",
    [
        lambda folder: b"",
        lambda folder: b"PK torn",
        lambda folder: left_by(folder).read_bytes()[:-100],
        deflated,
        changed(path=np.zeros((2, 32))),
        changed(path=np.full((2, 64), np.nan)),
        changed(start=np.zeros((3, 64))),
        changed(start=np.full((20, 64), "0")),
        changed(steps=np.array(1)),
        changed(steps=np.array([0.0, 1.0])),
        changed(lengths=np.zeros(3)),
        changed(stride=np.array(0)),
    ],
)
def test_a_file_that_cannot_be_read_is_a_warning_and_a_new_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bytes_of: Callable[[Path], bytes]
) -> None:
    data = bytes_of(tmp_path)
    (tmp_path / "trajectory.npz").write_bytes(data)
    start, now = sketched(positions(0)), sketched(positions(1))
    trajectory = Trajectory(tmp_path)
    assert trajectory.move(4, NAMES, start) == {}
    draft = Draft(5, 0.0, NAMES, now)
    trajectory.publish(draft)
    assert draft.scalars["trajectory/distance"] == pytest.approx(float(np.linalg.norm(now - start)))
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "trajectory: begins anew"
    ]
    assert Trajectory(tmp_path).move(5, NAMES, now) == {}
    assert len(caplog.records) == 1  # the file is whole again


def test_a_file_that_cannot_be_written_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = Trajectory(tmp_path / "missing")
    for step in range(2):
        nowhere.publish(Draft(step, 0.0, NAMES, sketched(positions(step))))
    nowhere.finish(Draft(1, 0.0, NAMES))
    assert caplog.text.count("cannot write") == 1


def test_a_path_of_other_shards_is_none_to_go_on_with(tmp_path: Path) -> None:
    """Each part of a sharded parameter has signs of its own: the sketches cannot be compared."""
    sketches = [sketched(positions(seed)) for seed in range(3)]
    first = Trajectory(tmp_path, layout=4)
    first.move(0, NAMES, sketches[0])
    first.move(1, NAMES, sketches[1])
    first.finish(Draft(1, 0.0, NAMES))
    for layout, steps in ((4, [0, 1]), (2, [1]), (0, [1])):
        trajectory = Trajectory(tmp_path, layout)
        trajectory.move(1, NAMES, sketches[2])
        assert trajectory._steps == steps


def test_nothing_is_shown_where_no_parameter_is_seen() -> None:
    trajectory, draft = Trajectory(), Draft(1, 0.0, (), np.empty((0, 64)))
    trajectory.publish(draft)
    assert draft.scalars == {}
    assert draft.arrays == {}
