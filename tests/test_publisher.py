"""The publisher under slow, hanging, failing and forked use. Times are generous: it is about
seconds against for ever, not about milliseconds."""

import errno
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvizllm.telemetry import HistorySink, JsonlSink, Publication, Publisher, TensorBoardSink


class GatedSink(HistorySink):
    """Hangs in its first write until `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Event()

    def write(self, publication: Publication) -> None:
        self.entered.set()
        assert self.gate.wait(60)
        super().write(publication)


class FullDisk(HistorySink):
    """Has space for what comes before step `full_at`; the rest waits, as Sink demands."""

    def __init__(self, full_at: int) -> None:
        super().__init__()
        self.full_at, self.closed = full_at, False
        self.waiting: list[Publication] = []

    def write(self, publication: Publication) -> None:
        self.waiting.append(publication)
        self.flush()

    def flush(self) -> None:
        while self.waiting:
            if self.waiting[0].step >= self.full_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(self.waiting.pop(0))

    def close(self) -> None:
        self.closed = True


def submit(publisher: Publisher, step: int) -> None:
    publisher.submit(lambda: Publication(step, 0.0, {"x": float(step)}))


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def gated() -> Iterator[tuple[GatedSink, Publisher]]:
    """A publisher of 4 places whose thread hangs in the sink with step 0 in hand."""
    sink = GatedSink()
    publisher = Publisher([sink], queue_size=4)
    submit(publisher, 0)
    assert sink.entered.wait(60)
    yield sink, publisher
    sink.gate.set()
    publisher.close()


def test_publications_reach_every_sink_in_order() -> None:
    sinks = [HistorySink(), HistorySink()]
    publisher = Publisher(sinks)
    for step in range(50):
        submit(publisher, step)
        assert step % 10 or publisher.flush(60)
    publisher.close()
    expected = [{"step": step, "x": float(step)} for step in range(50)]
    assert [sink.history for sink in sinks] == [expected, expected]
    assert publisher.dropped == 0


def test_a_hanging_sink_does_not_block_and_drops_the_oldest(gated) -> None:
    sink, publisher = gated
    begin = time.perf_counter()
    for step in range(1, 1001):
        submit(publisher, step)
    assert time.perf_counter() - begin < 1.0  # the sink hangs for good; 1,000 submits take 2 ms
    assert publisher.dropped == 1000 - 4
    sink.gate.set()
    assert publisher.flush(60)
    assert [row["step"] for row in sink.history] == [0, 997, 998, 999, 1000]
    assert "pyvizllm/dropped" not in sink.history[0]
    assert sink.history[1]["pyvizllm/dropped"] == 996
    assert "pyvizllm/dropped" not in sink.history[2]  # told once, until it changes


def test_flush_waits_for_the_write_in_hand_though_later_ones_were_dropped(gated) -> None:
    sink, publisher = gated
    submit(publisher, 1)
    goal_reached = threading.Event()

    def flush() -> None:
        publisher.flush(60)
        goal_reached.set()

    waiting = threading.Thread(target=flush)
    waiting.start()
    for step in range(2, 20):
        submit(publisher, step)
    assert not goal_reached.wait(0.2)
    sink.gate.set()
    waiting.join(60)
    assert goal_reached.is_set()
    assert sink.history[0]["step"] == 0


def test_flush_times_out(gated) -> None:
    _, publisher = gated
    assert publisher.flush(timeout=0.05) is False


def test_the_thread_can_know_since_when_somebody_waits_for_it() -> None:
    publisher, seen = Publisher([HistorySink()]), []
    began, asked = threading.Event(), threading.Event()

    def look() -> None:
        began.set()
        asked.wait(60)
        until = time.monotonic() + 60
        while publisher.awaited_since is None and time.monotonic() < until:
            time.sleep(0.001)
        seen.append(publisher.awaited_since)

    publisher.submit(look)
    assert began.wait(60)
    assert publisher.awaited_since is None
    before = time.monotonic()
    asked.set()
    publisher.flush(60)
    assert before <= seen[0] <= time.monotonic()
    assert publisher.awaited_since is None
    publisher.close()
    assert publisher.awaited_since is not None


def test_close_gives_a_hanging_sink_up(gated, caplog: pytest.LogCaptureFixture) -> None:
    _, publisher = gated
    submit(publisher, 1)
    publisher.close(timeout=0.05)
    assert "gave up after 0.05 s, 2 publications are not on disk" in caplog.text


def test_a_full_disk_is_asked_again_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    full, healthy = FullDisk(full_at=2), HistorySink()
    publisher = Publisher([full, healthy])
    caplog.set_level(logging.INFO)
    for step in range(5):
        submit(publisher, step)
        assert publisher.flush(60) is (step < 2)
    assert [row["step"] for row in healthy.history] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in full.history] == [0, 1]
    full.full_at = 100
    wait_until(lambda: len(full.history) == 5)  # without another publication
    assert publisher.flush(60)
    publisher.close()
    assert [row["step"] for row in full.history] == [0, 1, 2, 3, 4]
    assert full.closed
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (
            logging.WARNING,
            "Publisher: FullDisk waits for its disk, training goes on: "
            "OSError(28, 'No space left on device')",
        ),
        (logging.INFO, "Publisher: FullDisk writes again"),
    ]


def test_close_writes_everything_before_it_waits_for_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written survives the process, which may not live as long as a slow fsync."""
    monkeypatch.setattr("pyvizllm.telemetry.publisher._FLUSH_SECONDS", 0.0)
    done: list[str] = []
    flushing, gate = threading.Event(), threading.Event()

    class SlowDisk(HistorySink):
        def write(self, publication: Publication) -> None:
            done.append(f"write {publication.step}")

        def flush(self) -> None:
            flushing.set()
            assert gate.wait(60)
            done.append("flush")

    publisher = Publisher([SlowDisk()])
    submit(publisher, 0)
    assert flushing.wait(60)
    submit(publisher, 1)
    submit(publisher, 2)
    closing = threading.Thread(target=publisher.close)
    closing.start()
    wait_until(lambda: publisher._closing)
    gate.set()
    closing.join()
    assert done[:4] == ["write 0", "flush", "write 1", "write 2"]


def test_a_sink_that_fails_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(HistorySink):
        calls = 0

        def write(self, publication: Publication) -> None:
            self.calls += 1
            raise ZeroDivisionError("in the sink")

        def close(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    broken, healthy = Broken(), HistorySink()
    publisher = Publisher([broken, healthy])
    for step in range(3):
        submit(publisher, step)
        assert publisher.flush(60)
    publisher.close()
    assert len(healthy.history) == 3
    assert broken.calls == 1
    assert [record.message for record in caplog.records] == [
        "Publisher: Broken is switched off, training goes on: ZeroDivisionError('in the sink')"
    ]


def test_a_disk_that_fails_on_flush_and_close(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(HistorySink):
        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

        close = flush

    publisher = Publisher([Failing()])
    for step in range(3):
        submit(publisher, step)
        assert not publisher.flush(60)
    publisher.close()
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " Failing waits for its disk, training goes on",
        " Failing could not write its last records",
    ]


def test_what_a_sink_drops_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Dropping(HistorySink):
        dropped = 3

    sink = Dropping()
    publisher = Publisher([sink])
    submit(publisher, 1)
    submit(publisher, 2)
    publisher.close()
    assert publisher.dropped == 3
    assert sink.history[0] == {"step": 1, "x": 1.0, "pyvizllm/dropped": 3.0}
    assert sink.history[1] == {"step": 2, "x": 2.0}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_real_sinks_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    board, history = TensorBoardSink(tmp_path), HistorySink()
    os.dup2(os.open("/dev/full", os.O_WRONLY), board._file._descriptor)
    publisher = Publisher([board, JsonlSink(tmp_path / "run.jsonl"), history])
    for step in range(3):
        submit(publisher, step)
    publisher.close()
    assert len(history.history) == 3
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " TensorBoardSink waits for its disk, training goes on",
        " JsonlSink waits for its disk, training goes on",
        " TensorBoardSink could not write its last records",
        " JsonlSink could not write its last records",
    ]


def test_a_snapshot_may_have_nothing_to_show() -> None:
    sink = HistorySink()
    publisher = Publisher([sink])
    seen = []
    publisher.submit(lambda: seen.append(1))
    submit(publisher, 2)
    publisher.close()
    assert (seen, [row["step"] for row in sink.history]) == ([1], [2])


def test_a_snapshot_that_fails_loses_itself_only(caplog: pytest.LogCaptureFixture) -> None:
    sink = HistorySink()
    publisher = Publisher([sink])
    for _ in range(2):
        publisher.submit(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    submit(publisher, 3)
    publisher.close()
    assert [row["step"] for row in sink.history] == [3]
    assert sink.history[0]["pyvizllm/dropped"] == 2
    assert [record.message for record in caplog.records] == [
        "Publisher: a publication could not be made: ZeroDivisionError('division by zero')"
    ]


def test_flush_means_on_disk(tmp_path: Path) -> None:
    board, lines = TensorBoardSink(tmp_path), JsonlSink(tmp_path / "run.jsonl")
    publisher = Publisher([board, lines])
    sizes = []
    for step in range(100):
        submit(publisher, step)
        if step % 25 == 24:
            assert publisher.flush(60)
            sizes.append(board.path.stat().st_size)
            assert len(lines.path.read_text().splitlines()) == step + 1
    assert sizes == sorted(set(sizes))
    publisher.close()
    assert board.path.stat().st_size == sizes[-1]


def test_a_published_step_is_on_disk_soon_without_any_flush(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run.jsonl")
    publisher = Publisher([sink])
    submit(publisher, 1)
    wait_until(lambda: sink.path.stat().st_size > 0, 5)
    publisher.close()


def test_close_drains_and_later_submits_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    sink = HistorySink()
    publisher = Publisher([sink], queue_size=500)
    for step in range(300):
        submit(publisher, step)
    publisher.close()
    assert len(sink.history) == 300
    submit(publisher, 300)
    submit(publisher, 301)
    publisher.close()
    assert publisher.dropped == 2
    assert len(sink.history) == 300
    assert [record.message for record in caplog.records] == [
        "Publisher.submit: already closed, nothing more is written"
    ]


def test_queue_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="expected queue_size of at least 1, got 0"):
        Publisher([], queue_size=0)


SCRIPT = """
import os, sys
from pyvizllm.telemetry import JsonlSink, Publication, Publisher, TensorBoardSink
publisher = Publisher([TensorBoardSink(sys.argv[1]), JsonlSink(sys.argv[1] + "/run.jsonl")], 1000)
def submit(step):
    publisher.submit(lambda: Publication(step, 0.0, {"x": float(step)}))
for step in range(200):
    submit(step)
"""


def run_script(tmp_path: Path, ending: str) -> tuple[int, list[int]]:
    """Run SCRIPT and `ending` in a process; its exit code and the steps in its JSONL file."""
    command = [sys.executable, "-c", SCRIPT + ending, str(tmp_path)]
    done = subprocess.run(command, timeout=120, capture_output=True, check=False)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    return done.returncode, [int(line.split(",")[0].removeprefix('{"step": ')) for line in lines]


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("raise RuntimeError('in training')", 1), ("sys.exit(3)", 3)]
)
def test_everything_is_written_at_exit_without_close(tmp_path: Path, ending, code) -> None:
    assert run_script(tmp_path, ending) == (code, list(range(200)))


def test_a_forked_child_writes_nothing_and_does_not_hang(tmp_path: Path) -> None:
    """The child leaves through the interpreter's own exit, with its atexit and file closing."""
    ending = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
if child == 0:
    for step in range(1000, 1100):
        submit(step)
    assert publisher.flush()
    publisher.close()
    sys.exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
submit(200)
publisher.close()
sys.exit(status)
"""
    code, steps = run_script(tmp_path, ending)
    assert code == 7
    assert steps == list(range(201))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_the_lock_is_held_does_not_hang() -> None:
    publisher = Publisher([HistorySink()])

    def child() -> None:
        submit(publisher, 1)
        assert publisher.flush()
        publisher.close()

    def hold() -> None:  # in a thread that the child has not, so it is never released there
        with publisher._submitting:
            held.set()
            assert forked.wait(60)

    held, forked = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    forked.set()
    holder.join()
    process.join(30)
    process.kill()  # one that hangs would keep pytest itself from ending
    process.join()
    assert process.exitcode == 0
    publisher.close()
