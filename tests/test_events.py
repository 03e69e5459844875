"""Checksums, records and scalars of the compiled encoder, against tensorboardX's."""

import math

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from pyvizllm import _events

# RFC 3720, B.4, and the check value of the catalogues.
KNOWN = {
    b"": 0,
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(reversed(range(32))): 0x113FDB5C,
}


@pytest.mark.parametrize("portable", [False, True])
def test_checksums_of_the_standard(portable: bool) -> None:
    assert {data: _events.crc32c(data, portable) for data in KNOWN} == KNOWN


def test_both_checksums_agree_at_every_length_and_alignment() -> None:
    data = np.random.default_rng(0).bytes(300)
    for begin in range(9):
        for end in range(begin, len(data)):
            part = data[begin:end]
            assert _events.crc32c(part) == _events.crc32c(part, portable=True)


def test_a_record_is_tensorflows() -> None:
    for event in (b"", b"x", np.random.default_rng(0).bytes(100_003)):
        length = len(event).to_bytes(8, "little")
        expected = length + masked_crc32c(length).to_bytes(4, "little")
        expected += event + masked_crc32c(event).to_bytes(4, "little")
        assert _events.record(event) == expected


@pytest.mark.parametrize("step", [0, 1, 127, 128, 2**40, -1])
def test_a_summary_record_is_the_event_that_protobuf_makes(step: int) -> None:
    summary = Summary()
    summary.value.add(tag="a", simple_value=1.5)
    event = Event(wall_time=12.25, step=step, summary=summary)
    record = _events.summary_record(12.25, step, summary.SerializeToString())
    assert Event.FromString(record[12:-4]) == event
    assert record == _events.record(record[12:-4])


def test_scalars_are_the_summary_that_protobuf_makes() -> None:
    values = {"a": 0.1, "b/\u00fc": -0.0, "c": math.inf, "d": 1e300, "e": 1e-46, "": 3.0}
    summary = Summary()
    for i, (tag, value) in enumerate(values.items()):
        entry = summary.value.add(tag=tag, simple_value=value)
        if i == 1:
            entry.metadata.summary_description = "what it is" * 20
            entry.metadata.plugin_data.plugin_name = "scalars"
    described = ["", "what it is" * 20, *[""] * 4]
    made = _events.scalar_summary(list(values), list(values.values()), described)
    assert Summary.FromString(made) == summary
    nan = Summary.FromString(_events.scalar_summary(["n"], [math.nan], []))
    assert math.isnan(nan.value[0].simple_value)
    assert _events.scalar_summary([], [], []) == b""


def test_scalars_without_their_values() -> None:
    with pytest.raises(ValueError, match="scalar_summary: expected 2 values, got 1"):
        _events.scalar_summary(["a", "b"], [1.0], [])
    with pytest.raises(ValueError, match="scalar_summary: expected no description or 1, got 2"):
        _events.scalar_summary(["a"], [1.0], ["x", "y"])
