"""Messages between publishers through the store that torchrun's processes meet by."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from torch.distributed import TCPStore

from pyvizllm.telemetry import part_exchange
from pyvizllm.telemetry.part_exchange import (
    Message,
    MissingPartError,
    PartExchange,
    Sending,
)

PATIENCE = 0.3  # seconds


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(part_exchange, "_store", lambda: store)
    monkeypatch.setattr(part_exchange, "PATIENCE", PATIENCE)
    monkeypatch.setattr(part_exchange, "_IMPATIENCE", 0.0)
    return store


def sent(sender: PartExchange, name: str, place: int, values: object = 0.0) -> None:
    sender.send(name, Sending(f"steps {place}", place), {"values": np.array(values)})


def received(receiver: PartExchange, names: Sequence[str], place: int) -> list[Message] | None:
    try:
        return list(receiver.receive(names, Sending(f"steps {place}", place)))
    except MissingPartError:
        return None


def waited(receiver: PartExchange, name: str, place: int) -> bool:
    """Whether it was waited for what has not come."""
    begin = time.monotonic()
    assert received(receiver, [name], place) is None
    return time.monotonic() - begin >= PATIENCE


def test_a_message_larger_than_the_store_takes_arrives_and_is_gone(store: TCPStore) -> None:
    """12 MB that cannot be compressed: the store's limit of a value is 8 MiB."""
    sender, receiver = PartExchange(), PartExchange()
    before = store.num_keys()
    bits = np.random.default_rng(0).integers(-(2**63), 2**63, size=1_500_000)
    sender.send("a", Sending("1", 1), {"bits": bits, "norm": np.array([np.nan, 1.0])})
    sender.send("b", Sending("1", 1), {"empty": np.empty((0, 64))})
    first, second = receiver.receive(["a", "b"], Sending("1", 1))
    np.testing.assert_array_equal(first["bits"], bits)
    np.testing.assert_array_equal(first["norm"], [np.nan, 1.0])
    assert second["empty"].shape == (0, 64)
    assert store.num_keys() == before + 2  # where each sender is


def test_a_receiver_that_is_late_gets_all(store: TCPStore) -> None:
    sender, receiver = PartExchange(), PartExchange()
    for place in range(50):
        sent(sender, "a", place, place)
    for place in range(50):
        (message,) = received(receiver, ["a"], place) or []
        assert message["values"] == place


def test_messages_that_nobody_fetches_do_not_pile_up(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """800 kB each, of which two are kept; it is seen at once that the others will not come."""
    monkeypatch.setattr(part_exchange, "_KEPT", 2 * 2**20)
    sender, random, before = PartExchange(), np.random.default_rng(0), store.num_keys()
    for place in range(6):
        sent(sender, "a", place, random.random(100_000))
    # Where the sender is; two messages, and of how many pieces each is.
    assert store.num_keys() == before + 1 + 2 * 2
    receiver = PartExchange()
    assert [waited(receiver, "a", place) for place in range(4)] == [False] * 4
    assert received(receiver, ["a"], 5) is not None


def test_a_process_that_hands_over_other_steps_is_not_waited_for(store: TCPStore) -> None:
    sender, receiver = PartExchange(), PartExchange()
    sent(sender, "a", 7)
    assert not waited(receiver, "a", 5)
    assert waited(receiver, "a", 8)


def test_what_comes_later_is_waited_for(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes one of 0.3 s; where that was too little, the next wait is twice as long."""
    sender, receiver = PartExchange(), PartExchange()
    sent(sender, "here", 1)
    sent(sender, "here", 2)
    timer = threading.Timer(0.2, sent, (sender, "late", 1))
    timer.start()
    assert received(receiver, ["here", "late"], 1) is not None
    timer.join()
    assert waited(receiver, "late", 2)
    sent(sender, "late", 2)  # too late: but it is heard of
    timer = threading.Timer(0.45, sent, (sender, "late", 3))
    timer.start()
    assert received(receiver, ["late"], 3) is not None
    timer.join()


def test_what_never_comes_is_waited_for_once(store: TCPStore) -> None:
    sender, receiver = PartExchange(), PartExchange()
    assert [waited(receiver, "absent", place) for place in (1, 2, 3)] == [True, False, False]
    sent(sender, "absent", 3)
    assert [waited(receiver, "absent", place) for place in (4, 5)] == [True, False]


def test_somebody_who_waits_for_the_thread_does_not_wait_long(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.1 s in all, from when he began; messages that are there are taken all the same."""
    monkeypatch.setattr(part_exchange, "_HURRY", 0.1)
    since: list[float | None] = [None]
    sender, receiver = PartExchange(), PartExchange(lambda: since[0])
    sent(sender, "a", 1)
    since[0] = begin = time.monotonic()
    assert not waited(receiver, "b", 1)
    assert time.monotonic() - begin >= 0.1
    assert not waited(receiver, "c", 1)
    assert time.monotonic() - begin < 0.25
    assert received(receiver, ["a"], 1) is not None
    since[0] = time.monotonic()  # somebody else
    threading.Timer(0.03, sent, (sender, "d", 1)).start()
    assert received(receiver, ["d"], 1) is not None
    since[0] = None
    assert waited(receiver, "e", 1)


def test_a_message_that_is_taken_back_meanwhile_is_missing(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_exchange, "_HURRY", 0.1)
    sender, receiver = PartExchange(), PartExchange()
    sent(sender, "a", 1)
    sent(sender, "a", 2)
    store.delete_key("a/steps 1/0")
    assert received(receiver, ["a"], 1) is None
    assert received(receiver, ["a"], 2) is not None
