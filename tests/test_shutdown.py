"""SIGTERM and exceptions in this process; tests/test_resilience.py has those that end one."""

import gc
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType

import pytest

from pyvizllm.telemetry import HistorySink, Publication, Publisher, Shutdown


class Program:
    """A program with a SIGTERM handler of its own, that decides to go on."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)


@pytest.fixture
def program() -> Iterator[Program]:
    program = Program()
    before = signal.signal(signal.SIGTERM, program.on_signal)
    yield program
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def sink() -> HistorySink:
    return HistorySink()


@pytest.fixture
def publisher(sink: HistorySink) -> Iterator[Publisher]:
    publisher = Publisher([sink])
    yield publisher
    publisher.close()


def submit(publisher: Publisher, step: int) -> None:
    publisher.submit(lambda: Publication(step, 0.0, {"x": 1.0}))


def test_sigterm_publishes_what_is_there_and_goes_on(
    program: Program, publisher: Publisher, sink: HistorySink
) -> None:
    reasons: list[str] = []

    def dump(reason: str) -> None:
        reasons.append(reason)
        submit(publisher, 2)

    shutdown = Shutdown(publisher, [dump])
    submit(publisher, 1)
    signal.raise_signal(signal.SIGTERM)
    assert [row["step"] for row in sink.history] == [1, 2]
    submit(publisher, 3)  # the program's handler decided to go on
    signal.raise_signal(signal.SIGTERM)
    assert [row["step"] for row in sink.history] == [1, 2, 3]
    assert reasons == ["SIGTERM"]
    assert program.signals == [signal.SIGTERM] * 2
    shutdown.close()
    assert signal.getsignal(signal.SIGTERM) == program.on_signal


def test_a_signal_within_submit_does_not_wait_for_itself(
    program: Program, publisher: Publisher, sink: HistorySink
) -> None:
    """The handler runs wherever the training thread stands, also where it holds the lock."""
    shutdown = Shutdown(publisher)
    submit(publisher, 1)
    with publisher._submitting:
        signal.raise_signal(signal.SIGTERM)
        assert [row["step"] for row in sink.history] == [1]
    shutdown.close()


def test_a_callback_that_fails_stops_no_other(
    program: Program, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: list[str] = []
    shutdown = Shutdown(publisher, [lambda _: 1 / 0, reasons.append])
    signal.raise_signal(signal.SIGTERM)
    assert (reasons, program.signals) == (["SIGTERM"], [signal.SIGTERM])
    (record,) = caplog.records
    assert "failed: ZeroDivisionError('division by zero')" in record.message
    shutdown.close()


@pytest.mark.parametrize("first_closed", [0, 1])
def test_two_in_one_process(program: Program, publisher: Publisher, first_closed: int) -> None:
    calls: list[str] = []
    both = [Shutdown(publisher, [lambda reason, name=name: calls.append(name)]) for name in "ab"]
    both[first_closed].close()
    signal.raise_signal(signal.SIGTERM)
    assert calls == ["b" if first_closed == 0 else "a"]
    assert program.signals == [signal.SIGTERM]
    both[1 - first_closed].close()
    signal.raise_signal(signal.SIGTERM)
    assert len(calls) == 1
    assert program.signals == [signal.SIGTERM] * 2


@pytest.mark.parametrize("thread", ["main", "another"])
def test_those_that_overlap_leave_nothing_behind(
    program: Program, publisher: Publisher, thread: str
) -> None:
    """Each is opened before the one before is closed, so none is ever the last in the chain."""

    def close(shutdown: Shutdown) -> None:
        closing = threading.Thread(target=shutdown.close)
        closing.start()
        closing.join()

    calls: list[tuple[int, str]] = []
    kept: list[weakref.ref[Shutdown]] = []
    last = Shutdown(publisher)
    for number in range(30):
        following = Shutdown(publisher, [lambda reason, n=number: calls.append((n, reason))])
        last.close() if thread == "main" else close(last)
        kept.append(weakref.ref(last))
        last = following
    del following
    gc.collect()
    assert [number for number, shutdown in enumerate(kept) if shutdown() is not None] == []
    signal.raise_signal(signal.SIGTERM)
    assert (calls, program.signals) == ([(29, "SIGTERM")], [signal.SIGTERM])
    last.close()
    assert signal.getsignal(signal.SIGTERM) == program.on_signal


def test_one_closed_by_another_thread_is_passed_over(
    program: Program, publisher: Publisher
) -> None:
    first = Shutdown(publisher)
    closing = threading.Thread(target=first.close)
    closing.start()
    closing.join()
    kept = weakref.ref(first)
    second = Shutdown(publisher)
    del first
    gc.collect()
    assert kept() is None
    second.close()
    assert signal.getsignal(signal.SIGTERM) == program.on_signal


def test_a_closed_one_under_a_foreign_handler_keeps_nothing_alive(publisher: Publisher) -> None:
    class Watched:
        def dump(self, reason: str) -> None:
            raise AssertionError(reason)

        def busy(self) -> bool:
            raise AssertionError

    before = signal.getsignal(signal.SIGTERM)
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    watched = Watched()
    shutdown = Shutdown(publisher, [watched.dump], watched.busy)
    ours = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))  # type: ignore[operator]
    kept = weakref.ref(watched)
    shutdown.close()
    del watched
    gc.collect()
    assert kept() is None
    signal.raise_signal(signal.SIGTERM)
    assert signals == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def test_an_ignored_sigterm_stays_ignored(publisher: Publisher) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        shutdown = Shutdown(publisher, [pytest.fail])
        signal.raise_signal(signal.SIGTERM)
        shutdown.close()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_leaves_the_handler_alone(program: Program, publisher: Publisher) -> None:
    made: list[Shutdown] = []
    thread = threading.Thread(target=lambda: made.append(Shutdown(publisher)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == program.on_signal
    made[0].close()


@pytest.mark.parametrize("interactive", [False, True])
def test_an_unhandled_exception_is_the_reason(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, interactive: bool
) -> None:
    reasons: list[str] = []
    shutdown = Shutdown(publisher, [reasons.append])
    monkeypatch.delattr(sys, "last_value", raising=False)
    shutdown._at_exit()
    assert reasons == []
    monkeypatch.setattr(sys, "last_value", ValueError("in training"), raising=False)
    if interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    shutdown._at_exit()
    shutdown.close()
    assert reasons == ([] if interactive else ["exception: ValueError('in training')"])


def test_close_forgets_the_exit(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    unregistered: list[object] = []
    monkeypatch.setattr("atexit.unregister", unregistered.append)
    shutdown = Shutdown(publisher)
    shutdown.close()
    assert unregistered == [shutdown._at_exit]
