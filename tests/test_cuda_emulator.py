"""The emulator finds the mistakes it is there to find (tests/cuda_on_cpu/faults.cu)."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from cuda_on_cpu.build import build
from cuda_on_cpu.emulator import ORDERS

THREADS = 256


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("faults", "tests/cuda_on_cpu/faults.cu")))
    library.run_fault.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, name: str, order: str) -> tuple[torch.Tensor, str | None]:
    out = torch.full((THREADS,), torch.nan)
    library.set_schedule(ORDERS[order], 1)
    message = library.run_fault(name.encode(), ctypes.c_void_p(out.data_ptr()))
    return out, None if message is None else message.decode()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["reverse", "copy", "cluster"])
def test_a_right_kernel_runs(name, order, library):
    out, message = run(library, name, order)
    assert message is None
    assert torch.equal(out, torch.arange(THREADS - 1, -1, -1).float())


@pytest.mark.parametrize("order", ORDERS)
def test_unwritten_shared_memory_is_nan(order, library):
    """What a missing barrier leads to: half of the values are read before they are written."""
    out, message = run(library, "missing_barrier", order)
    assert message is None
    assert out.isnan().sum() == THREADS // 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "unwritten"),
    [
        ("copy_not_waited_for", THREADS),
        ("block_not_started", THREADS // 2),  # the second loses what the first wrote into it
        ("missing_cluster_barrier", THREADS // 2),  # the first reads before the second wrote
    ],
)
def test_what_was_not_waited_for_is_nan(name, unwritten, order, library):
    out, message = run(library, name, order)
    assert message is None
    assert out.isnan().sum() == unwritten


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("half_barrier", r"deadlock in block 0: 128 threads wait, thread \d+ at faults.cu:\d+"),
        ("two_barriers", r"divergent barriers: faults.cu:\d+ and faults.cu:\d+"),
        ("half_warp", r"deadlock in block 0: 128 threads wait"),
        ("half_cluster", r"deadlock in block 0: 256 threads wait, thread 0 at cluster.cuh:\d+"),
        ("foreign_block", "no block of this rank in the cluster"),
        ("foreign_lane", r"shuffle from a lane outside the mask at faults.cu:\d+"),
    ],
)
def test_faults_end_the_launch(name, sentence, order, library):
    _, message = run(library, name, order)
    assert message is not None
    assert re.search(sentence, message)
    assert message.startswith(name)
    out, message = run(library, "reverse", order)  # and leave the emulator whole
    assert message is None
    assert out[0] == THREADS - 1
