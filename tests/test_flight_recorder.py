"""The flight recorder: what it writes, how it fails, and that a real NaN is in it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tasks import class_loss, digit_batches
from steps_of import fit
from test_history import made
from torch import Tensor, nn

import pyvizllm.telemetry
from pyvizllm.telemetry.flight_recorder import FlightRecorder, flight_text, load_flight
from pyvizllm.telemetry.history import History
from pyvizllm.telemetry.records import Finding, MicroBatches, Steps


class Root(nn.Module):
    """The square root of a square: 0 / 0 in the gradient of a blank image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(64, 16, bias=False), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.first(x).pow(2).sqrt())
        return out


def history(*chunks: Steps) -> History:
    result = History()
    for chunk in chunks:
        result.append(chunk)
    return result


def test_a_nan_of_a_real_training_is_in_the_dump(tmp_path: Path) -> None:
    batches = list(digit_batches(96, batch_size=16))
    images, labels, ids = batches[70]
    batches[70] = torch.cat((images[:-1], torch.zeros(1, 64))), labels, ids
    model = Root()
    result = fit(model, batches, class_loss, torch.optim.AdamW(model.parameters()), accumulate=2)
    nan = result.of("non_finite")

    path = FlightRecorder(result.diagnosis.history, tmp_path).react(result.findings)
    assert path == tmp_path / "flight" / "step-36-non_finite.npz"
    flight = load_flight(path)
    assert (flight.reason, flight.step, flight.names[0]) == ("non_finite", 36, "first.weight")
    assert flight.steps.tolist() == list(range(1, 49))
    bad = flight.statistic("grad", "nans")[:, 0] > 0
    assert np.flatnonzero(bad)[0] == 35
    assert flight.findings[flight.findings.index(nan)].evidence["flat_index"] == 0
    assert flight.sample_ids[35] == [batches[70][2], batches[71][2]]
    assert flight.losses[:36].tolist() == pytest.approx(result.losses[:36])
    assert np.isfinite(flight.losses[:36]).all()  # the gradient is bad, the loss is not yet
    assert np.isnan(flight.losses[36:]).all()
    seen = f"48 steps of {len(flight.names)} parameters, {len(flight.findings)} finding"
    assert repr(flight).startswith(f"<Flight: 'non_finite' at step 36, {seen}")
    assert flight.metrics[0, 0] == 32  # tokens: two micro-batches of 16
    assert flight.scalars["train/learning_rate"][0] == 1e-3


def test_columns_that_came_later_and_kinds_that_are_missing(tmp_path: Path) -> None:
    past = history(made(1, 3, "ab"), made(4, 2, "abc", kinds=("grad",)))
    path = FlightRecorder(past, tmp_path).dump("SIGTERM!", 5)
    assert path is not None
    assert path.name == "step-5-sigterm.npz"
    flight = load_flight(path)
    norms = flight.statistic("grad", "norm")
    assert norms.shape == (5, 3)
    assert np.isnan(norms[:3, 2]).all()
    assert np.isfinite(norms[3:]).all()
    assert np.isnan(flight.statistic("param", "norm")[3:]).all()
    assert (flight.micro_batch_losses, flight.sample_ids) == ([[]] * 5, [[]] * 5)


def test_ids_of_any_kind_are_kept_readable(tmp_path: Path) -> None:
    steps = made(1, 1, "a")
    ids = [[torch.tensor([3, 4]), {"file": "x"}, np.array([5]), Path("y")]]
    batches = MicroBatches(
        np.ones((1, 4)), np.ones((1, 4), np.bool_), np.ones((1, 4)), np.ones((1, 4), np.int64), ids
    )
    steps = Steps(**{**vars(steps), "micro_batches": batches})
    path = FlightRecorder(history(steps), tmp_path).dump("asked", 1)
    assert path is not None
    assert load_flight(path).sample_ids == [[[3, 4], {"file": "x"}, [5], repr(Path("y"))]]


def test_the_first_four_and_the_last_four_stay(tmp_path: Path) -> None:
    recorder = FlightRecorder(history(made(1, 1, "a")), tmp_path)
    for step in (9, 10, 11, 100, 200, 1000, 1001, 1002, 1003, 2000, 2001):
        assert recorder.dump("loss_spike", step) is not None
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "flight").iterdir())
    assert steps == [9, 10, 11, 100, 1002, 1003, 2000, 2001]


def test_a_dump_that_fails_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "flight").write_text("a file where the folder should be")
    recorder = FlightRecorder(history(made(1, 1, "a")), tmp_path)
    with caplog.at_level(logging.WARNING, "pyvizllm"):
        assert recorder.dump("exception", 1) is None
        assert recorder.dump("exception", 2) is None
    assert len(caplog.records) == 1
    assert "step-1-exception" in caplog.text


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    recorder = FlightRecorder(history(made(1, 1, "a")), tmp_path)
    assert recorder.dump("exception", 1) is None
    assert "No space left" in caplog.text
    assert list((tmp_path / "flight").iterdir()) == []


def test_nothing_recorded_is_nothing_dumped(tmp_path: Path) -> None:
    assert FlightRecorder(History(), tmp_path).dump("exception", 0) is None
    assert FlightRecorder(history(made(1, 1, "a")), tmp_path).react([]) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_dump_is_refused(tmp_path: Path) -> None:
    for name, content in (("text", b"hello"), ("empty", b""), ("zip", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="load_flight: expected a dump of the flight recorder"):
            load_flight(tmp_path / name)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"got '.*other\.npz'"):
        load_flight(tmp_path / "other.npz")


def test_a_damaged_dump_is_a_sentence(tmp_path: Path) -> None:
    """zipfile, zlib and NumPy raise ten other things on what they did not write."""
    path = FlightRecorder(history(made(1, 3, "ab")), tmp_path).dump("asked", 3)
    assert path is not None
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        # Half of them where the directory of the archive is: its end.
        for place in generator.integers(generator.choice((0, len(whole) - 900)), len(whole), 4):
            data[place] = generator.integers(256)
        path.write_bytes(data)
        try:
            load_flight(path)
        except ValueError as error:
            assert "load_flight: expected a dump" in str(error)  # noqa: PT017 - some can be read
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("message", ["x" * 10_000, "no end: " * 1000, "\udcff/../\0\n"])
def test_any_message_is_a_reason(tmp_path: Path, message: str) -> None:
    path = FlightRecorder(history(made(1, 1, "a")), tmp_path).dump(f"exception: {message}", 3)
    assert path is not None
    assert path.parent == tmp_path / "flight"
    assert re.fullmatch(r"step-3-exception[a-z_]{,60}\.npz", path.name)
    assert load_flight(path).reason == f"exception: {message}"


def test_the_text_names_the_file_and_the_findings() -> None:
    finding = Finding("non_finite", "serious", 3, "the gradient of a", "Go back.")
    text = flight_text(Path("r/flight/step-3-non_finite.npz"), "non_finite", 3, [finding])
    assert "**non_finite** at step 3" in text
    assert "flight/step-3-non_finite.npz" in text
    assert "- *serious*, step 3: the gradient of a. Go back." in text
    assert "pyvizllm.telemetry.load_flight reads it" in text
    assert pyvizllm.telemetry.load_flight is load_flight
