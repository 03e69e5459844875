"""Real processes that are killed, told to end, fail, fork, or run out of disk while they publish.

Each reads back what TensorBoard and a reader of the JSON lines find afterwards.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)

from pyvizllm.telemetry import (
    HistorySink,
    JsonlSink,
    Publication,
    Publisher,
    TensorBoardSink,
    read_history,
)

ROOT = Path(__file__).resolve().parents[1]

BEGIN = """
import os, sys, time
import numpy as np
from pyvizllm.telemetry import *
folder = sys.argv[1]
sinks = [TensorBoardSink(folder), JsonlSink(folder + "/run.jsonl")]
publisher = Publisher(sinks, 1_000_000)
counts = np.zeros((3, 4096), dtype=np.int64)
counts[:, 1000:1030] = 7
table = HistogramTable(("grad/a", "grad/b", "grad/c"), counts, np.ones((3, 4)))
def publish(step):
    publisher.submit(lambda: Publication(step, 1e9 + step, {"x": float(step)}, [table]))
"""


def start(folder: Path, script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEGIN + script]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, str(folder)], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, bufsize=1
    )


def run(folder: Path, script: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(folder, script)
    shown, errors = process.communicate(timeout=120)
    return process.returncode, shown, errors


def published(folder: Path) -> list[int]:
    """The steps that both files have, which must be the same."""
    events = EventAccumulator(str(folder), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("x")]
    assert [step for step, value in scalars] == [value for step, value in scalars]
    for tag in ("grad/a", "grad_log10/c"):
        shown = [event.step for event in events.Histograms(tag)]
        assert shown in ([step for step, _ in scalars], [step for step, _ in scalars][:-1])
    entries = read_history(folder / "run.jsonl")
    assert [entry["scalars"]["x"] for entry in entries] == [entry["step"] for entry in entries]
    steps = [step for step, _ in scalars]
    assert abs(len(entries) - len(steps)) <= 1  # killed between the one and the other
    return min(steps, [entry["step"] for entry in entries], key=len)


ENDLESS = """
for step in range(1_000_000):
    publish(step)
    os.write(1, f"{step} {time.time()}\\n".encode())  # whole lines, also within a signal
    time.sleep(0.002)
"""


def end_with(process: subprocess.Popen[str], number: int, after: float) -> tuple[float, list[str]]:
    """Signal a process of ENDLESS `after` seconds from its first step; when, and its lines."""
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        timer = threading.Timer(after, process.send_signal, [number])
        timer.start()
        lines += process.stdout.readlines()
        killed = time.time()
        timer.join()
    return killed, lines


def test_kill_9_loses_a_second_at_most(tmp_path: Path) -> None:
    process = start(tmp_path, ENDLESS)
    killed, lines = end_with(process, signal.SIGKILL, after=3.0)
    assert process.returncode == -signal.SIGKILL
    times = dict(line.split() for line in lines if line.endswith("\n"))
    old = [int(step) for step, when in times.items() if float(when) < killed - 1.0]
    assert len(old) > 100
    steps = published(tmp_path)
    assert steps == list(range(len(steps)))
    assert set(old) <= set(steps)


def test_sigterm_in_the_middle_of_training(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "shutdown = Shutdown(publisher, [lambda reason: os.write(1, f'{reason}\\n'.encode())])\n"
        + ENDLESS.replace("time.sleep(0.002)", "step % 50 or time.sleep(0.01)"),
    )
    _, lines = end_with(process, signal.SIGTERM, after=0.5)
    assert process.returncode == -signal.SIGTERM
    assert lines[-1] == "SIGTERM\n"
    steps = published(tmp_path)
    last = int(lines[-2].split()[0])
    assert steps == list(range(len(steps)))
    assert len(steps) - 1 in (last, last + 1)  # submitted, but not yet printed


def test_an_exception_in_training(tmp_path: Path) -> None:
    script = """
shutdown = Shutdown(publisher, [lambda reason: (print(reason), publish(500))])
for step in range(500):
    publish(step)
raise RuntimeError("in training")
"""
    assert run(tmp_path, script)[:2] == (1, "exception: RuntimeError('in training')\n")
    assert published(tmp_path) == list(range(501))


def test_forked_children_and_workers_leave_the_files_alone(tmp_path: Path) -> None:
    """A child that ends by SIGTERM, one that exits, and a DataLoader's workers."""
    code, _, errors = run(
        tmp_path,
        """
import signal
import torch
shutdown = Shutdown(publisher, [lambda reason: print(reason)])
class Data(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        publish(10_000 + i)
        publisher.flush()
        return i
for step in range(100):
    publish(step)
for i in range(3):
    child = os.fork()
    if child == 0:
        publish(20_000)
        if i == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        if i == 1:
            publisher.close()
        sys.exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGTERM if i == 0 else 7), status
loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
for step, batch in enumerate(loader, start=100):
    publish(step)
""",
    )
    assert (code, errors) == (0, "")
    assert published(tmp_path) == list(range(164))


def test_a_full_disk_that_is_freed_again(tmp_path: Path) -> None:
    """The limit on the size of a file refuses writes as a full disk does, in mid-record too."""
    code, _, errors = run(
        tmp_path,
        """
import resource
for step in range(50):
    publish(step)
assert publisher.flush()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (sinks[0].path.stat().st_size + 700, hard))
begin = time.monotonic()
for step in range(50, 300):
    publish(step)
assert time.monotonic() - begin < 1
assert not publisher.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
while not publisher.flush():
    time.sleep(0.01)
for step in range(300, 350):
    publish(step)
publisher.close()
assert publisher.dropped == 0
""",
    )
    assert code == 0, errors
    assert errors.count("TensorBoardSink waits for its disk, training goes on") == 1
    assert published(tmp_path) == list(range(350))


def submit(publisher: Publisher, step: int) -> None:
    publisher.submit(lambda: Publication(step, 1e9 + step, {"x": float(step)}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_deleted_during_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    publisher = Publisher([TensorBoardSink(folder), JsonlSink(folder / "run.jsonl")])
    for step in range(10):
        submit(publisher, step)
    assert publisher.flush(60)
    shutil.rmtree(folder)
    for step in range(10, 20):
        submit(publisher, step)
    publisher.close()
    assert [entry["step"] for entry in read_history(folder / "run.jsonl")] == list(range(10, 20))
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("x")] == list(range(10, 20))
    assert ["was deleted" in record.message for record in caplog.records] == [True, True]


def test_a_disk_that_hangs_blocks_neither_submit_nor_close(tmp_path: Path) -> None:
    """A pipe that nobody reads: the write does not come back."""
    sink, healthy = JsonlSink(tmp_path / "run.jsonl"), HistorySink()
    reader, writer = os.pipe()
    os.dup2(writer, sink._file._descriptor)
    os.close(writer)
    publisher = Publisher([healthy, sink], queue_size=8)
    text = "x" * 4096

    def snapshot() -> Publication:
        return Publication(1, 0.0, {"x": 1.0}, texts={"long": text})

    longest = 0.0
    for _ in range(2000):
        begin = time.perf_counter()
        publisher.submit(snapshot)
        longest = max(longest, time.perf_counter() - begin)
        if len(healthy.history) < 10:
            time.sleep(0.001)
    assert longest < 0.25  # a scheduler's hiccup, not a disk's
    assert publisher.flush(timeout=0.05) is False
    begin = time.monotonic()
    publisher.close(timeout=0.1)
    assert time.monotonic() - begin < 5
    assert publisher.dropped > 1900
    while publisher._thread.is_alive():  # the disk comes back: the thread ends by itself
        os.read(reader, 1 << 20)
        publisher._thread.join(0.01)
    os.close(reader)
