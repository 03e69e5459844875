"""Messages between publishers through the store that torchrun's processes meet by."""

from __future__ import annotations

import time

import numpy as np
import pytest
from torch.distributed import TCPStore

from pyvizllm.telemetry import part_exchange
from pyvizllm.telemetry.part_exchange import PartExchange


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(part_exchange, "_store", lambda: store)
    monkeypatch.setattr(part_exchange, "PATIENCE", 0.3)
    return store


def test_a_message_larger_than_the_store_takes_arrives_and_is_gone(store: TCPStore) -> None:
    """12 MB that cannot be compressed: the store's limit of a value is 8 MiB."""
    sender, receiver = PartExchange(), PartExchange()
    before = store.num_keys()
    bits = np.random.default_rng(0).integers(-(2**63), 2**63, size=1_500_000)
    sender.send("a", {"bits": bits, "norm": np.array([np.nan, 1.0])})
    sender.send("b", {"empty": np.empty((0, 64))})
    first, second = receiver.receive(["a", "b"]) or []
    np.testing.assert_array_equal(first["bits"], bits)
    np.testing.assert_array_equal(first["norm"], [np.nan, 1.0])
    assert second["empty"].shape == (0, 64)
    assert store.num_keys() == before


def test_messages_that_nobody_fetches_do_not_pile_up(store: TCPStore) -> None:
    sender = PartExchange()
    before = store.num_keys()
    for number in range(50):
        sender.send(f"m/{number}", {"number": np.array(number)})
    assert store.num_keys() == before + 2 * 8  # a message and how many pieces it has
    (last,) = PartExchange().receive(["m/49"]) or []
    assert last["number"] == 49


def test_what_does_not_come_is_waited_for_once(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_exchange, "_IMPATIENCE", 0.0)
    receiver, waited = PartExchange(), []
    PartExchange().send("there", {"x": np.zeros(1)})
    for key in ("absent", "absent", "there", "absent"):
        begin = time.monotonic()
        assert (receiver.receive([key]) is None) == (key == "absent")
        waited.append(time.monotonic() - begin >= 0.3)
    assert waited == [True, False, False, True]


def test_numbers_count_calls(store: TCPStore) -> None:
    one, other = PartExchange(), PartExchange()
    assert [one.number("n"), other.number("n"), one.number("m")] == [1, 2, 1]
