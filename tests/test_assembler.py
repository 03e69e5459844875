"""What is shown of recorded steps, against the same numbers worked out from the values by numpy."""

import math
import re

import numpy as np
import pytest
from recorded_steps import steps_of

from pyvizllm.telemetry.assembler import NOTICE_TAG, Assembler, Draft
from pyvizllm.telemetry.dashboard import LAYOUT
from pyvizllm.telemetry.descriptions import STAGE_TAG, description
from pyvizllm.telemetry.groups import Layers, layer_of, layer_tags
from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import KINDS, Publication, Steps

NAMES = ("embedding.weight", "h.2.fc.weight", "h.2.fc.bias", "h.10.fc.weight", "scale")
SIZES = ((6, 4), (4, 4), (4,), (3,), ())


def random_values(seed: int, steps: int, scale: float = 1.0) -> list[list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [[generator.normal(size=size) * scale for size in SIZES] for _ in range(steps)]


def norm(*arrays: np.ndarray) -> float:
    return math.sqrt(sum(float((np.asarray(a) ** 2).sum()) for a in arrays))


def histograms_of(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.stack(
        [
            np.bincount(np.float32(v).ravel().view(np.uint32) >> 20, minlength=4096)
            for v in map(np.atleast_1d, values)
        ]
    )
    moments = np.array([[v.min(), v.max(), v.sum(), (v**2).sum()] for v in values])
    return counts, moments


def test_layers_of_names() -> None:
    names = ["transformer.h.11.attn.c_attn.weight", "h.3.mlp.fc.bias", "wte.weight", "scale", "0.w"]
    assert list(map(layer_of, names)) == ["transformer.h.11", "h.3", "wte", "scale", "0"]
    assert layer_tags(["wte", "h.2", "h.10", "d.7"]) == ["wte", "h.02", "h.10", "d.7"]
    assert layer_tags(["x y", "h.2", "x_y", "h.02", "h.10"]) == [
        *("x y", "h.02", "x_y_2", "h.02_2", "h.10"),
    ]
    layers = Layers.of(["h.0.a", "wte.w", "h.0.b", "h.1.a"])
    assert layers.names == ("h.0", "wte", "h.1")
    values = np.array([[1.0, 10.0, 100.0, np.nan], [0.5, 2.0, 4.0, 8.0]])
    np.testing.assert_array_equal(layers.sum(values), [[101.0, 10.0, np.nan], [4.5, 2.0, 8.0]])


def test_gradients_of_an_interval_that_came_in_two_parts() -> None:
    values = random_values(0, 5)
    values[1][4] = None  # no gradient in that step
    assembler = Assembler(NAMES)
    assembler.add(steps_of(1, NAMES, {"grad": values[:3]}))
    assembler.add(steps_of(4, NAMES, {"grad": values[3:]}))
    scalars = assembler.publish(5, 0.0, {}).scalars

    totals = [norm(*(v for v in step if v is not None)) for step in values]
    assert scalars["train/grad_norm"] == pytest.approx(np.mean(totals), rel=1e-12)
    assert scalars["train/grad_norm_max"] == pytest.approx(max(totals), rel=1e-12)
    for i, name in enumerate(NAMES):
        own = [norm(step[i]) for step in values if step[i] is not None]
        assert scalars[f"grad_norm/{name}"] == pytest.approx(np.mean(own), rel=1e-12)
    layer = [norm(step[1], step[2]) for step in values]
    assert scalars["layer_grad_norm/h.02"] == pytest.approx(np.mean(layer), rel=1e-12)
    assert "layer_grad_norm/h.10" in scalars
    assert (scalars["health/nans"], scalars["health/infs"], scalars["health/zeros"]) == (0, 0, 0)
    # The next interval knows nothing of this one.
    assembler.add(steps_of(6, NAMES, {"grad": random_values(1, 1, 1e-3)}))
    assert assembler.publish(6, 0.0, {}).scalars["train/grad_norm_max"] < 0.1


def test_nan_is_shown_and_stays_where_it_is() -> None:
    values = random_values(0, 2)
    values[1][1][0, 0] = np.nan
    values[1][3][:2] = np.inf
    values[0][0][0] = 0.0
    assembler = Assembler(NAMES)
    assembler.add(steps_of(1, NAMES, {"grad": values}))
    scalars = assembler.publish(2, 0.0, {}).scalars
    assert math.isnan(scalars["train/grad_norm"])
    assert math.isnan(scalars["train/grad_norm_max"])
    assert math.isnan(scalars["layer_grad_norm/h.02"])
    assert scalars["layer_grad_norm/h.10"] == math.inf
    assert scalars["grad_norm/scale"] == pytest.approx(np.mean([norm(s[4]) for s in values]))
    assert (scalars["health/nans"], scalars["health/infs"]) == (1, 2)
    assert scalars["health/zeros"] == pytest.approx(4 / (2 * 48))


def test_updates_where_they_were_measured() -> None:
    params, updates = random_values(2, 3), random_values(3, 3, 1e-3)
    updates[1] = [None] * 5  # an optimizer that is not ours: one step of three
    params[2][4] = np.zeros(())  # a ratio to nothing is no ratio
    assembler = Assembler(NAMES)
    assembler.add(steps_of(1, NAMES, {"param": params, "update": updates}))
    scalars = assembler.publish(3, 0.0, {}).scalars
    for i, name in enumerate(NAMES[:4]):
        ratios = [norm(updates[s][i]) / norm(params[s][i]) for s in (0, 2)]
        assert scalars[f"update_ratio/{name}"] == pytest.approx(np.mean(ratios), rel=1e-12)
        assert scalars[f"param_norm/{name}"] == pytest.approx(norm(params[2][i]), rel=1e-12)
    assert scalars["update_ratio/scale"] == pytest.approx(norm(updates[0][4]) / norm(params[0][4]))
    layer = [norm(*updates[s][1:3]) / norm(*params[s][1:3]) for s in (0, 2)]
    assert scalars["layer_update_ratio/h.02"] == pytest.approx(np.mean(layer), rel=1e-12)


def test_what_was_logged() -> None:
    metrics = np.zeros((3, 53))
    metrics[:, :4] = [(10, 5, 20.0, 8.0), (0, 0, 0, 0), (30, 20, 30.0, 16.0)]
    steps = steps_of(
        1,
        NAMES,
        {"grad": random_values(0, 3)},
        scalars={
            "train/reward": np.array([1.0, 99.0, 2.0]),
            "train/learning_rate": np.array([1e-3, 2e-3, 3e-3]),
            "train/never": np.zeros(3),
        },
        logged={
            "train/reward": np.array([True, False, True]),
            "train/learning_rate": np.ones(3, dtype=bool),
            "train/never": np.zeros(3, dtype=bool),
        },
        metrics=metrics,
        skipped=np.array([False, True, False]),
        clipped=np.array([1e-3, np.nan, 1e3]),
    )
    assembler = Assembler(NAMES)
    assembler.add(steps)
    scalars = assembler.publish(3, 0.0, {}, seconds=4.0).scalars
    assert scalars["train/loss"] == pytest.approx(50 / 40)
    assert scalars["train/accuracy"] == pytest.approx(25 / 40)
    assert scalars["train/perplexity"] == pytest.approx(math.exp(50 / 40))
    assert scalars["train/entropy"] == pytest.approx(24 / 40)
    assert scalars["train/tokens_per_second"] == 10.0
    assert "train/steps_per_second" not in scalars
    assert scalars["train/reward"] == 1.5
    assert scalars["train/learning_rate"] == 3e-3
    assert "train/never" not in scalars
    assert scalars["health/skipped_steps"] == 1
    assert scalars["train/clipped"] == 0.5  # of the two steps that pyvizllm clipped


def test_throughput_without_metrics_is_that_of_steps() -> None:
    assembler = Assembler(NAMES)
    for first, count in ((1, 2), (3, 3)):
        assembler.add(steps_of(first, NAMES, {"grad": random_values(0, count)}))
    assert assembler.publish(5, 0.0, {}, seconds=2.0).scalars["train/steps_per_second"] == 2.5
    assembler.add(steps_of(6, NAMES, {"grad": random_values(0, 1)}))
    assert assembler.publish(6, 0.0, {}, seconds=4.0).scalars["train/steps_per_second"] == 0.25


def test_a_norm_that_is_nan_is_no_step_without_clipping() -> None:
    values = [random_values(0, 1)[0], [np.array([np.nan])] * len(NAMES)]
    limits = np.array([1e-3, 1.0])
    assembler = Assembler(NAMES)
    assembler.add(steps_of(1, NAMES, {"grad": values}, clipped=limits))
    assert assembler.publish(2, 0.0, {}).scalars["train/clipped"] == 1.0
    assembler.add(steps_of(3, NAMES, {"grad": values[1:]}, clipped=limits[1:]))
    assert "train/clipped" not in assembler.publish(3, 0.0, {}).scalars


def test_the_loss_that_was_logged_goes_before_that_of_the_metrics_everywhere() -> None:
    metrics = np.zeros((2, 53))
    metrics[:, :4] = [(10, 5, 20.0, 8.0), (30, 20, 30.0, 16.0)]
    logged = {"train/loss": np.array([True, True])}
    steps = steps_of(
        *(1, NAMES, {"grad": random_values(0, 2)}),
        scalars={"train/loss": np.array([1.5, 2.5])},
        logged=logged,
        metrics=metrics,
    )
    assembler, history = Assembler(NAMES), History()
    assembler.add(steps)
    history.append(steps)
    scalars = assembler.publish(2, 0.0, {}).scalars
    assert scalars["train/loss"] == history.loss().mean() == 2.0
    assert scalars["train/perplexity"] == pytest.approx(math.exp(2.0))
    assert scalars["train/accuracy"] == pytest.approx(25 / 40)
    assert description("train/loss").startswith("Mean of the losses that were logged")


def test_histograms_have_the_counts_and_moments_they_came_with() -> None:
    values = random_values(4, 1)[0]
    counts, moments = histograms_of(values)
    counts[3] = 0  # a parameter of which nothing was counted
    assembler = Assembler(NAMES)
    grad, param = assembler.publish(
        1, 0.0, {"grad": (counts, moments), "param": (counts, moments)}
    ).histograms
    assert grad.tags == tuple(f"grad/{name}" for name in NAMES if name != NAMES[3])
    assert param.tags[0] == "param/embedding.weight"
    np.testing.assert_array_equal(grad.counts, np.delete(counts, 3, axis=0))
    np.testing.assert_array_equal(grad.moments, np.delete(moments, 3, axis=0))


def test_too_many_tags_become_those_of_layers(caplog: pytest.LogCaptureFixture) -> None:
    values = random_values(4, 1)[0]
    counts, moments = histograms_of(values)
    moments[2] = [np.nan, np.nan, 0.0, 0.0]  # of nothing finite
    names = 4  # layers
    curves, layers, axes = 3 * len(NAMES), 2 * names, 2 * len(KINDS)
    just_enough = curves + layers + axes * len(NAMES)
    histograms = {"grad": (counts, moments)}

    def published(max_tags: int) -> Publication:
        assembler = Assembler(NAMES, max_tags=max_tags)
        assembler.add(steps_of(1, NAMES, {"grad": [values]}))
        return assembler.publish(1, 0.0, histograms)

    everything = published(just_enough)
    assert everything.histograms[0].tags == tuple(f"grad/{name}" for name in NAMES)
    assert NOTICE_TAG not in everything.texts

    by_layer = published(just_enough - 1)
    (table,) = by_layer.histograms
    assert table.tags == ("grad/embedding", "grad/h.02", "grad/h.10", "grad/scale")
    np.testing.assert_array_equal(table.counts[1], counts[1] + counts[2])
    np.testing.assert_array_equal(table.moments[1], moments[1])
    np.testing.assert_array_equal(table.moments[[0, 2, 3]], moments[[0, 3, 4]])
    assert "grad_norm/h.2.fc.bias" in by_layer.scalars
    assert "5 parameters would have more than max_tags=" in by_layer.texts[NOTICE_TAG]

    least = published(curves + layers + axes * names - 1)
    assert not [tag for tag in least.scalars if tag.startswith("grad_norm/")]
    assert "layer_grad_norm/h.02" in least.scalars


def test_a_parameter_that_begins_to_train_within_an_interval() -> None:
    values = random_values(5, 4)
    assembler = Assembler(NAMES[:2])
    assembler.add(steps_of(1, NAMES[:2], {"grad": [step[:2] for step in values[:2]]}))
    assembler.add(steps_of(3, NAMES, {"grad": values[2:]}))
    scalars = assembler.publish(4, 0.0, {}).scalars
    expected = np.mean([norm(step[0]) for step in values])
    assert scalars[f"grad_norm/{NAMES[0]}"] == pytest.approx(expected, rel=1e-12)
    expected = np.mean([norm(step[4]) for step in values[2:]])
    assert scalars["grad_norm/scale"] == pytest.approx(expected, rel=1e-12)
    layer = [norm(step[1]) for step in values[:2]] + [norm(*step[1:3]) for step in values[2:]]
    assert scalars["layer_grad_norm/h.02"] == pytest.approx(np.mean(layer), rel=1e-12)


def test_the_stage_is_said_when_it_changes() -> None:
    assembler = Assembler(NAMES)
    said = []
    for step, stage in enumerate(("before clipping", "before clipping", "after"), start=1):
        assembler.grad_stage = stage
        said.append(assembler.publish(step, 0.0, {}).texts.get(STAGE_TAG))
    assert said == ["before clipping", None, "after"]
    assert STAGE_TAG in description("grad_log10/h.0.weight")
    assert description("my/own") == ""


class Count:
    """A part that counts steps."""

    def __init__(self) -> None:
        self.steps = 0

    def add(self, steps: Steps) -> None:
        self.steps += len(steps)

    def publish(self, draft: Draft) -> None:
        draft.scalars["count"] = float(self.steps)


def test_parts_see_every_step_and_add_to_what_is_shown() -> None:
    assembler = Assembler(NAMES, parts=[Count()])
    assembler.add(steps_of(1, NAMES, {"grad": random_values(0, 2)}))
    assembler.add(steps_of(3, NAMES, {"grad": random_values(0, 3)}))
    assert assembler.publish(5, 0.0, {}).scalars["count"] == 5


class Broken(Count):
    """One that fails at a certain call."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def add(self, steps: Steps) -> None:
        self._fail("add")

    def publish(self, draft: Draft) -> None:
        self._fail("publish")

    def move(self, step: int, names: tuple[str, ...], sketch: np.ndarray) -> dict[str, float]:
        self._fail("move")
        return {}

    def finish(self, draft: Draft) -> None:
        self._fail("finish")

    def _fail(self, at: str) -> None:
        if at == self.at:
            self.calls += 1
            raise ZeroDivisionError(at)


@pytest.mark.parametrize("at", ["add", "publish", "move", "finish"])
def test_a_part_that_fails_is_switched_off_and_the_rest_is_shown(
    at: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(at)
    path = broken if at in ("move", "publish") else None
    parts = [Count()] if path else [broken, Count()]
    assembler = Assembler(NAMES, trajectory=path, parts=parts)
    sketch = np.zeros((len(NAMES), 64))
    for step in range(1, 4):
        assembler.start(step - 1, NAMES, sketch)
        assembler.add(steps_of(step, NAMES, {"grad": random_values(0, 1)}))
        scalars = assembler.publish(step, 0.0, {}, sketch=sketch).scalars
        assert scalars["count"] == step
        assert "train/grad_norm" in scalars
    assert assembler.finish(3, 0.0) is None
    assert broken.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "watch: Broken failed and is switched off"
    ]


def test_the_layout_comes_once() -> None:
    assembler = Assembler(NAMES)
    assert assembler.publish(1, 0.0, {}).layout == LAYOUT
    assert assembler.publish(2, 0.0, {}).layout is None
    for charts in LAYOUT.values():
        for patterns in charts.values():
            for pattern in patterns:
                tag = pattern.replace(".*", "h.0")
                assert re.fullmatch(pattern, tag)
                assert tag.startswith("eval/") or description(tag), tag
