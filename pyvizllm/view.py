"""TensorBoard on a run's folder: a child process, for this machine only, stopped with us."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import IO

HOST = "127.0.0.1"
DEFAULT_PORT = 6006
START_SECONDS = 120.0
"""Importing TensorBoard takes seconds, and far more on a machine that is busy training."""


def view(run_dir: Path, port: int | None = None) -> None:
    """Serve the run, or the folder of runs, until Ctrl-C.

    Args:
        run_dir: a folder with event files in it or below it.
        port: None for 6006, or a free one if that is taken.

    Raises:
        FileNotFoundError: there is no such folder, or no event file in it.
        ValueError: the port asked for is taken or not a port.
        ChildProcessError: TensorBoard ended by itself (with what it printed) or never answered.
    """
    _check_events(run_dir)
    port = _choose_port(port)
    signal.signal(signal.SIGTERM, _exit)  # else our own end would leave TensorBoard behind
    with tempfile.TemporaryFile("w+") as output:
        server = subprocess.Popen(_command(run_dir, port), stdout=output, stderr=output)
        try:
            _wait_until_it_answers(server, port, output)
            print(
                f"TensorBoard shows {run_dir} at http://{HOST}:{port}/ (Ctrl-C stops it)",
                flush=True,
            )
            code = server.wait()
            raise ChildProcessError(_ended(code, output))
        except KeyboardInterrupt:
            print("\nTensorBoard stopped.")
        finally:
            _stop(server)


def _command(run_dir: Path, port: int) -> list[str]:
    options = {"--logdir": run_dir, "--host": HOST, "--port": port, "--reload_interval": 1}
    flags = [f"{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "tensorboard.main", *flags]


def _check_events(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise FileNotFoundError(f"view: expected the folder of a run, got {run_dir}, which is none")
    if next(run_dir.rglob("events.out.tfevents.*"), None) is None:
        raise FileNotFoundError(
            f"view: expected the folder of a run, got {run_dir}, without events"
        )


def _choose_port(port: int | None) -> int:
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"view: expected a port from 1 to 65535, got {port}")
    wanted = DEFAULT_PORT if port is None else port
    with socket.socket() as probe:
        # As the server will: a port that a server has just left is not taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            if port is not None:
                raise ValueError(
                    f"view: expected a free port, got {port}: {error.strerror}"
                ) from error
            probe.bind((HOST, 0))
        chosen: int = probe.getsockname()[1]
        return chosen


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int, output: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        code = server.poll()
        if code is not None:
            raise ChildProcessError(_ended(code, output))
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.1)
    raise ChildProcessError(f"view: TensorBoard did not answer within {START_SECONDS:.0f} seconds")


def _ended(code: int, output: IO[str]) -> str:
    output.seek(0)
    return f"view: TensorBoard ended with code {code}:\n{output.read().strip()}"


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _exit(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)
