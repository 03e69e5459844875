"""What the recorder publishes, against numpy in float64 on the same gradients, and what it must
not do on the training thread: read a tensor."""

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from histogram_reference import Histogram, histograms_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy
from pyvizllm.telemetry import Publication, Publisher, Recorder, TensorBoardSink, gradients

REL = 1e-6  # tensor_stats sums blocks in float32; a mistake here shows in the first digits
SIZES = {"embedding": (50, 8), "layer.weight": (8, 8), "layer.bias": (8,), "scale": ()}


class KeepSink:
    """Keeps whole publications."""

    def __init__(self) -> None:
        self.publications: list[Publication] = []

    def write(self, publication: Publication) -> None:
        self.publications.append(publication)

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


@pytest.fixture
def sink() -> KeepSink:
    return KeepSink()


@pytest.fixture
def publisher(sink: KeepSink) -> Iterator[Publisher]:
    publisher = Publisher([sink])
    yield publisher
    publisher.close()


def parameters(device: str = "cpu") -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(size, device=device)) for name, size in SIZES.items()}


def set_gradients(named: dict[str, nn.Parameter], seed: int) -> dict[str, np.ndarray]:
    """Random gradients of very different sizes; returns them as float64."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for exponent, (name, parameter) in enumerate(named.items()):
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0**-exponent
        parameter.grad = gradient.to(parameter.device)
        values[name] = gradient.double().numpy()
    return values


def metrics(tokens: int, correct: int, loss: float, entropy: float) -> CrossEntropyMetrics:
    sums = torch.zeros(53, dtype=torch.float64)
    sums[:4] = torch.tensor([tokens, correct, loss * tokens, entropy * tokens])
    return CrossEntropyMetrics(sums)


def histograms(publication: Publication) -> dict[str, Histogram]:
    """The publication's histograms by tag."""
    return {
        tag: histogram
        for table in publication.histograms
        for tag, histogram in zip(table.tags, histograms_of(table), strict=True)
    }


def bins_of(values: list[np.ndarray]) -> np.ndarray:
    bits = np.concatenate([v.astype(np.float32).ravel() for v in values]).view(np.uint32)
    return np.bincount(bits >> 20, minlength=4096)


def norm(values: list[np.ndarray]) -> float:
    return math.sqrt(sum(float((v**2).sum()) for v in values))


def test_gradients_are_accumulated_over_the_steps_of_an_interval(sink, publisher) -> None:
    named = parameters()
    recorder = Recorder(named.items(), publisher, every=3)
    steps = []
    for step in range(1, 7):
        steps.append(set_gradients(named, seed=step))
        total = recorder.observe_gradients()
        assert total.shape == ()
        assert float(total) == pytest.approx(norm(list(steps[-1].values())), rel=REL)
        recorder.step(step)
    publisher.flush(60)
    assert [publication.step for publication in sink.publications] == [3, 6]
    for publication, seen in zip(sink.publications, (steps[:3], steps[3:]), strict=True):
        assert set(histograms(publication)) == {f"grad/{name}" for name in SIZES}
        norms = [norm(list(step.values())) for step in seen]
        assert publication.scalars["train/grad_norm"] == pytest.approx(np.mean(norms), rel=REL)
        assert publication.scalars["train/grad_norm_max"] == pytest.approx(max(norms), rel=REL)
        assert publication.scalars["health/nans"] == publication.scalars["health/infs"] == 0
        for name in SIZES:
            values = [step[name] for step in seen]
            shown, all_values = histograms(publication)[f"grad/{name}"], np.stack(values)
            np.testing.assert_array_equal(shown.counts, bins_of(values))
            assert (shown.min, shown.max) == (all_values.min(), all_values.max())
            sum_error = abs(shown.sum - all_values.sum())
            assert sum_error <= REL * np.abs(all_values).sum()
            assert shown.sum_squares == pytest.approx((all_values**2).sum(), rel=REL)
            mean_norm = np.mean([norm([value]) for value in values])
            assert publication.scalars[f"grad_norm/{name}"] == pytest.approx(mean_norm, rel=REL)


def test_a_published_interval_is_not_touched_by_the_next(sink, publisher) -> None:
    """The publisher may read long after the next steps have begun."""
    gate = threading.Event()
    publisher.submit(lambda: (gate.wait(60), Publication(0, 0.0))[1])
    named = parameters()
    recorder = Recorder(named.items(), publisher, every=1)
    expected = []
    for step in range(1, 5):
        expected.append(set_gradients(named, seed=step)["embedding"])
        recorder.observe_gradients()
        recorder.log_metrics(metrics(10, step, float(step), 1.0))
        recorder.log(value=torch.tensor(float(step)))
        recorder.step(step)
    gate.set()
    publisher.flush(60)
    for step, (values, publication) in enumerate(
        zip(expected, sink.publications[1:], strict=True), start=1
    ):
        counts = histograms(publication)["grad/embedding"].counts
        np.testing.assert_array_equal(counts, bins_of([values]))
        assert publication.scalars["train/value"] == publication.scalars["train/loss"] == step


def test_loss_metrics_are_weighted_by_tokens(sink, publisher) -> None:
    recorder = Recorder([], publisher, every=2)
    recorder.log_metrics(metrics(tokens=300, correct=30, loss=2.0, entropy=1.0))
    recorder.log_metrics(metrics(tokens=100, correct=90, loss=6.0, entropy=3.0))
    recorder.step(1)
    recorder.log_metrics(metrics(tokens=0, correct=0, loss=0.0, entropy=0.0))
    recorder.step(2)
    publisher.flush(60)
    scalars = sink.publications[0].scalars
    assert scalars["train/loss"] == 3.0
    assert scalars["train/accuracy"] == 0.3
    assert scalars["train/entropy"] == 1.5
    assert scalars["train/perplexity"] == pytest.approx(math.exp(3))
    assert set(scalars) == {
        f"train/{name}" for name in ("loss", "accuracy", "entropy", "perplexity")
    } | {"train/tokens_per_second"}


def test_tokens_per_second_over_the_wall_clock(sink, publisher, monkeypatch) -> None:
    clock = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr("pyvizllm.telemetry.recorder.time.perf_counter", lambda: next(clock))
    recorder = Recorder([], publisher, every=1)
    for step in (1, 2):
        recorder.log_metrics(metrics(600, 0, 1.0, 1.0))
        recorder.log_metrics(metrics(200, 0, 1.0, 1.0))
        recorder.step(step)
    publisher.flush(60)
    rates = [publication.scalars["train/tokens_per_second"] for publication in sink.publications]
    assert rates == [800 / 4, 800 / 2]


def test_tokens_per_second_without_the_time_of_a_pause(sink, publisher, monkeypatch) -> None:
    clock = iter([100.0, 102.0, 152.0, 154.0])  # begins; an evaluation of 50 s; ends
    monkeypatch.setattr("pyvizllm.telemetry.recorder.time.perf_counter", lambda: next(clock))
    recorder = Recorder([], publisher, every=1)
    with recorder.paused():
        pass
    recorder.log_metrics(metrics(600, 0, 1.0, 1.0))
    recorder.step(1)
    publisher.flush(60)
    assert sink.publications[0].scalars["train/tokens_per_second"] == 600 / 4


def test_a_loss_without_tokens_or_beyond_exp_is_shown(sink, publisher) -> None:
    recorder = Recorder([], publisher, every=1)
    for step, batch in enumerate(
        (metrics(0, 0, 0.0, 0.0), metrics(1, 0, 1e4, 0.0), metrics(1, 0, math.nan, 0.0)), start=1
    ):
        recorder.log_metrics(batch)
        recorder.step(step)
    publisher.flush(60)
    empty, huge, poisoned = (publication.scalars for publication in sink.publications)
    assert math.isnan(empty["train/loss"])
    assert (huge["train/loss"], huge["train/perplexity"]) == (1e4, math.inf)
    assert math.isnan(poisoned["train/loss"])


def test_logged_numbers_are_the_last_and_tensors_the_mean(sink, publisher) -> None:
    recorder = Recorder([], publisher, every=2)
    loss = torch.tensor(1.0, requires_grad=True)
    for step, value in ((1, 2.0), (2, 5.0)):
        recorder.log(learning_rate=value, my_loss=loss * value)
        recorder.step(step)
    publisher.flush(60)
    assert sink.publications[0].scalars == {"train/learning_rate": 5.0, "train/my_loss": 3.5}
    with pytest.raises(ValueError, match=r"expected my_loss of shape \[\], got \[2\]"):
        recorder.log(my_loss=torch.zeros(2))


def test_nan_and_inf_are_counted_and_do_not_hide_the_finite(sink, publisher) -> None:
    named = parameters()
    recorder = Recorder(named.items(), publisher, every=1)
    values = set_gradients(named, seed=0)
    gradient = named["embedding"].grad
    assert gradient is not None
    gradient[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    recorder.observe_gradients()
    recorder.step(1)
    publisher.flush(60)
    (publication,) = sink.publications
    assert publication.scalars["health/nans"] == 1
    assert publication.scalars["health/infs"] == 2
    assert math.isnan(publication.scalars["train/grad_norm"])
    assert math.isnan(publication.scalars["grad_norm/embedding"])
    shown = histograms(publication)["grad/embedding"]
    finite = values["embedding"].ravel()[3:]
    assert finite.min() * 1.125 <= shown.min <= finite.min()
    assert finite.max() <= shown.max <= finite.max() * 1.125
    bias = histograms(publication)["grad/layer.bias"]
    assert (bias.min, bias.max) == (values["layer.bias"].min(), values["layer.bias"].max())


def test_parameters_without_a_gradient_keep_the_rows_of_the_others_right(sink, publisher) -> None:
    named = parameters()
    recorder = Recorder(named.items(), publisher, every=2)
    first = set_gradients(named, seed=1)
    recorder.observe_gradients()
    recorder.step(1)
    second = set_gradients(named, seed=2)
    named["embedding"].grad = None
    total = recorder.observe_gradients()
    recorder.step(2)
    publisher.flush(60)
    assert float(total) == pytest.approx(norm([v for k, v in second.items() if k != "embedding"]))
    (publication,) = sink.publications
    # One of two steps had a gradient: the mean norm is over that one.
    shown = publication.scalars["grad_norm/embedding"]
    assert shown == pytest.approx(norm([first["embedding"]]), rel=REL)
    for name, values in (("embedding", [first]), ("scale", [first, second])):
        np.testing.assert_array_equal(
            histograms(publication)[f"grad/{name}"].counts, bins_of([v[name] for v in values])
        )


def test_tied_parameters_count_once_and_frozen_ones_not_at_all(sink, publisher) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

    model = Tied()
    recorder = Recorder(model.named_parameters(remove_duplicate=False), publisher, every=1)
    model.embedding.weight.grad = torch.full((5, 3), 2.0)
    assert float(recorder.observe_gradients()) == math.sqrt(15 * 4)
    recorder.step(1)
    model.frozen.bias.requires_grad_()  # unfrozen later: seen from its first gradient on
    model.frozen.bias.grad = torch.full((3,), 1.0)
    assert float(recorder.observe_gradients()) == math.sqrt(15 * 4 + 3)
    recorder.step(2)
    publisher.flush(60)
    first, second = sink.publications
    assert set(histograms(first)) == {"grad/embedding.weight"}
    assert set(histograms(second)) == {"grad/embedding.weight", "grad/frozen.bias"}


def test_a_parameter_unfrozen_within_an_interval_is_seen_at_once(sink, publisher) -> None:
    named = parameters()
    named["scale"].requires_grad_(False)
    recorder = Recorder(named.items(), publisher, every=2)
    values = set_gradients({k: v for k, v in named.items() if k != "scale"}, seed=1)
    recorder.observe_gradients()
    recorder.step(1)
    named["scale"].requires_grad_()
    named["scale"].grad = torch.tensor(3.0)
    total = recorder.observe_gradients()
    recorder.step(2)
    publisher.flush(60)
    assert float(total) == pytest.approx(math.hypot(norm(list(values.values())), 3.0))
    (publication,) = sink.publications
    assert publication.scalars["grad_norm/scale"] == 3.0
    assert histograms(publication)["grad/scale"].counts.sum() == 1
    assert histograms(publication)["grad/layer.bias"].counts.sum() == 16


def test_a_sparse_gradient_is_a_sentence(publisher) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    recorder = Recorder(embedding.named_parameters(), publisher, every=1)
    with pytest.raises(TypeError, match=r"expected dense gradients, got .*sparse_coo for weight"):
        recorder.observe_gradients()


def test_gradients_of_several_devices_are_measured_device_by_device(
    sink, publisher, monkeypatch
) -> None:
    """The meta device stands for a second one; its statistics are made up on the CPU."""
    asked, real = [], gradients.tensor_stats

    def stats(tensors: list[Tensor], *, histogram: bool | Tensor = True) -> Any:
        asked.append({tensor.device.type for tensor in tensors})
        if asked[-1] == {"meta"}:
            return real([torch.full(tensor.shape, 2.0) for tensor in tensors], histogram=False)
        return real(tensors, histogram=histogram)

    monkeypatch.setattr(gradients, "tensor_stats", stats)
    here = nn.Parameter(torch.zeros(4))
    there = nn.Parameter(torch.zeros(3, device="meta"))
    here.grad, there.grad = torch.ones(4), torch.zeros(3, device="meta")
    recorder = Recorder([("a", here), ("b", there)], publisher, every=1, histograms=False)
    assert float(recorder.observe_gradients()) == pytest.approx(4.0, rel=REL)
    recorder.step(1)
    publisher.flush(60)
    assert asked == [{"cpu"}, {"meta"}]
    assert sink.publications[0].scalars["grad_norm/b"] == pytest.approx(math.sqrt(12))


def test_without_histograms_and_without_parameters(sink, publisher) -> None:
    named = parameters()
    recorder = Recorder(named.items(), publisher, every=1, histograms=False)
    set_gradients(named, seed=0)
    recorder.observe_gradients()
    recorder.step(1)
    empty = Recorder([], publisher, every=1)
    assert float(empty.observe_gradients()) == 0.0
    empty.step(1)
    publisher.flush(60)
    assert [histograms(publication) for publication in sink.publications] == [{}, {}]
    assert set(sink.publications[0].scalars) >= {f"grad_norm/{name}" for name in SIZES}


def test_publish_hands_over_the_rest_once(sink, publisher) -> None:
    recorder = Recorder([], publisher, every=10, start_step=100)
    recorder.publish(100)  # nothing recorded yet
    for step in range(101, 114):
        recorder.log(learning_rate=float(step))
        recorder.step(step)
    recorder.publish(113)
    recorder.publish(113)
    publisher.flush(60)
    assert [(p.step, p.scalars["train/learning_rate"]) for p in sink.publications] == [
        (110, 110.0),
        (113, 113.0),
    ]


def test_a_training_as_tensorboard_shows_it(tmp_path) -> None:
    """Two micro-batches of unequal size a step, with the real loss, to the files and back."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    publisher = Publisher([TensorBoardSink(tmp_path)])
    recorder = Recorder(model.named_parameters(), publisher, every=2)
    nats, hits, tokens, norms = 0.0, 0, 0, []
    for step in (1, 2):
        model.zero_grad()
        for rows in (7, 20):
            inputs, target = torch.randn(rows, 6), torch.randint(5, (rows,))
            logits = model(inputs)
            loss, batch = cross_entropy(logits, target, reduction="sum", return_metrics=True)
            (loss / 27).backward()
            recorder.log_metrics(batch)
            nats += float(F.cross_entropy(logits.detach().double(), target, reduction="sum"))
            hits, tokens = hits + int((logits.argmax(1) == target).sum()), tokens + rows
        recorder.observe_gradients()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))  # clips after
        recorder.log(learning_rate=0.25)
        recorder.step(step)
    publisher.close()
    events = EventAccumulator(str(tmp_path)).Reload()

    def shown(tag: str) -> float:
        (event,) = events.Scalars(tag)
        assert event.step == 2
        return event.value

    assert shown("train/loss") == pytest.approx(nats / tokens, rel=1e-5)
    assert shown("train/perplexity") == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert shown("train/accuracy") == pytest.approx(hits / tokens)
    assert shown("train/grad_norm") == pytest.approx(np.mean(norms), rel=1e-5)
    assert shown("train/grad_norm_max") == pytest.approx(max(norms), rel=1e-5)
    assert shown("train/learning_rate") == 0.25
    assert shown("train/tokens_per_second") > 0
    assert sorted(events.Tags()["histograms"]) == [
        "grad/bias",
        "grad/weight",
        "grad_log10/bias",
        "grad_log10/weight",
    ]
    for name, parameter in model.named_parameters():
        histogram = events.Histograms(f"grad/{name}")[0].histogram_value
        assert histogram.num == sum(histogram.bucket) == 2 * parameter.numel()


def test_bad_arguments_are_sentences(publisher) -> None:
    with pytest.raises(ValueError, match="Recorder: expected every of at least 1, got 0"):
        Recorder([], publisher, every=0)
    recorder = Recorder([], publisher, every=1, start_step=7)
    with pytest.raises(ValueError, match="expected a step after 7, got 7"):
        recorder.step(7)


READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")


def test_no_tensor_is_read_on_the_training_thread(sink, publisher, monkeypatch) -> None:
    training = threading.current_thread()
    reads = []

    def guard(name: str) -> Any:
        real = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is training:
                raise AssertionError(f"Tensor.{name} on the training thread")
            reads.append(name)
            return real(self, *args, **kwargs)

        return read

    named = parameters()
    recorder = Recorder(named.items(), publisher, every=2)
    prepared = []
    for seed in (1, 2):
        set_gradients(named, seed)
        prepared.append([parameter.grad for parameter in named.values()])
    batch, loss = metrics(10, 5, 2.0, 1.0), torch.tensor(2.0, requires_grad=True)
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, guard(name))
        with pytest.raises(AssertionError, match="__float__ on the training thread"):
            float(loss)
        for step in range(1, 6):
            for parameter, gradient in zip(named.values(), prepared[step % 2], strict=True):
                parameter.grad = gradient
            recorder.log_metrics(batch)
            recorder.observe_gradients()
            recorder.log(learning_rate=1e-3, loss_again=loss)
            recorder.step(step)
        recorder.publish(5)
        publisher.flush(60)
    assert [publication.step for publication in sink.publications] == [2, 4, 5]
    assert "numpy" in reads
    assert sink.publications[0].scalars["train/loss_again"] == 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_waits_and_the_numbers_are_the_same(sink, publisher) -> None:
    named = parameters("cuda")
    recorder = Recorder(named.items(), publisher, every=2)
    loss = torch.tensor(3.0, device="cuda")
    seen = []
    for step in range(1, 5):
        seen.append(set_gradients(named, seed=step))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            recorder.observe_gradients()
            recorder.log(loss=loss)
            recorder.step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    publisher.flush(60)
    assert [publication.step for publication in sink.publications] == [2, 4]
    for publication, steps in zip(sink.publications, (seen[:2], seen[2:]), strict=True):
        assert publication.scalars["train/loss"] == 3.0
        for name in SIZES:
            np.testing.assert_array_equal(
                histograms(publication)[f"grad/{name}"].counts, bins_of([s[name] for s in steps])
            )
