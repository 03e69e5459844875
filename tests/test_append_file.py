"""Whole records or none, on disks that fill up, fail within a record, or lose the file."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvizllm.telemetry import append_file
from pyvizllm.telemetry.append_file import AppendFile


class Disk:
    """Stands in for os.write: takes `room` bytes, then refuses as a full disk does."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = os.write

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if self.room <= 0 and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.write(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(1 << 40)
    monkeypatch.setattr(append_file.os, "write", disk)
    return disk


def refused(action: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="No space left"):
        action()


@pytest.mark.parametrize("room", range(11))
def test_a_torn_record_is_cut_off_and_written_again(tmp_path: Path, disk: Disk, room: int) -> None:
    file = AppendFile(tmp_path / "file", tuple)
    disk.room = room
    refused(lambda: file.append([b"one,", b"two,", b"three,"]))
    whole = b"one,two," if room >= 8 else b"one," if room >= 4 else b""
    assert file.path.read_bytes() == whole
    assert file.waiting == 1
    refused(file.flush)
    disk.room = 100
    file.append([b"four,"])
    assert file.path.read_bytes() == b"one,two,three,four,"
    assert (file.waiting, file.dropped) == (0, 0)
    file.close()
    file.close()


def test_a_record_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = os.write
    monkeypatch.setattr(
        append_file.os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data)
    )
    file = AppendFile(tmp_path / "file", lambda: [b"begin"])
    file.append([b"x" * 1_000_000, b"y"])
    file.close()
    assert sizes == [5, 1_000_000, 1]


def test_a_cut_that_fails_is_made_before_the_next_record(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = AppendFile(tmp_path / "file", tuple)
    file.append([b"one,"])
    disk.room = 2
    with monkeypatch.context() as patch:
        patch.setattr(append_file.os, "ftruncate", broken)
        refused(lambda: file.append([b"two,"]))
        assert file.path.read_bytes() == b"one,tw"
        with pytest.raises(OSError, match="Input/output"):
            file.flush()
    disk.room = 100
    file.flush()
    assert file.path.read_bytes() == b"one,two,"
    file.close()


def test_the_oldest_are_dropped_when_too_much_waits(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_file, "_MAX_WAITING", 10)
    file = AppendFile(tmp_path / "file", tuple)
    disk.room = 0
    for group in ([b"aa", b"aa"], [b"bbbb"], [b"cc"], [b"ddd"], [b"x" * 50]):
        refused(lambda group=group: file.append(group))
    assert (file.waiting, file.dropped) == (1, 4)  # the newest is kept, whatever its size
    disk.room = 100
    file.append([b"e"])
    assert file.path.read_bytes() == b"x" * 50 + b"e"
    file.close()


def test_a_folder_that_was_deleted_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = AppendFile(tmp_path / "run" / "file", lambda: [b"begin,"])
    file.append([b"one,"])
    file.path.unlink()
    file.path.parent.rmdir()
    file.append([b"two,"])
    assert file.path.read_bytes() == b"begin,two,"
    file.path.unlink()
    file.path.parent.rmdir()
    file.path.parent.write_text("in the way")
    for group in ([b"three,"], [b"four,"]):
        with pytest.raises(OSError, match=r"exists|Not a directory"):
            file.append(group)
    file.path.parent.unlink()
    file.flush()
    assert file.path.read_bytes() == b"begin,three,four,"
    file.close()
    messages = [record.message.partition(" was ")[2] for record in caplog.records]
    assert messages == ["deleted: what follows goes to a new file"] * 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own; only root can make one, and not everywhere."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 << 10))
    file = AppendFile(small_disk / "file", tuple)
    record = bytes(range(250)) * 20  # 5000 bytes: the disk's end is within one
    for i in range(10):
        if i < 4:
            file.append([record])
        else:
            refused(lambda: file.append([record]))
            assert file.path.stat().st_size == 4 * len(record)
    ballast.unlink()
    file.flush()
    assert file.path.read_bytes() == 10 * record
    file.close()
