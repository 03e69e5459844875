"""The memory of the logits' gradients on the CPU, which is kept from one step to the next."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvizllm.ops import cross_entropy

MODES = [{}, {"fused": True}]
CLASSES = 2**14  # of float32: 16 rows are a MiB


def gradient_of(logits: Tensor, **options: bool) -> Tensor:
    target = torch.arange(len(logits)) % logits.shape[1]
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target, **options), logits)
    return gradient


@pytest.mark.parametrize("options", MODES)
def test_a_gradient_that_is_gone_leaves_its_memory_to_the_next(options):
    logits = torch.randn(40 * 16, CLASSES)
    gradient = gradient_of(logits, **options)
    address, expected = gradient.data_ptr(), gradient.clone()
    del gradient
    again = gradient_of(logits, **options)
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


@pytest.mark.parametrize("options", MODES)
def test_a_gradient_that_is_in_use_keeps_its_memory(options):
    logits = torch.randn(40 * 16, CLASSES)
    first = gradient_of(logits, **options)
    expected, view = first.clone(), first[-1]
    second = gradient_of(2 * logits, **options)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, expected)
    del first  # its last row is still in use
    gradient_of(3 * logits, **options)
    assert torch.equal(view, expected[-1])


def test_of_two_losses_the_larger_ones_memory_waits_for_it():
    large, small = torch.randn(90 * 16, CLASSES), torch.randn(40 * 16, CLASSES)
    address = gradient_of(large).data_ptr()
    for _ in range(3):
        assert gradient_of(small).data_ptr() != address
        assert gradient_of(large).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_changing_sizes(dtype):
    unit = 16 * 4 // dtype.itemsize  # rows of a MiB
    for mebibytes in (48, 32, 70, 1, 33, 64):
        logits = torch.randn(mebibytes * unit, CLASSES, dtype=dtype)
        ours = gradient_of(logits)
        exact = logits.double().requires_grad_()
        F.cross_entropy(exact, torch.arange(len(logits)) % CLASSES).backward()
        assert (ours.shape, ours.stride(), ours.dtype) == (logits.shape, (CLASSES, 1), dtype)
        error, largest = (ours.double() - exact.grad).abs().max(), exact.grad.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * largest


def test_threads_never_share_memory():
    logits = torch.randn(33 * 16, CLASSES)
    scales = (1.0, 2.0, 3.0, 4.0)
    expected = {scale: gradient_of(scale * logits) for scale in scales}
    wrong: list[float] = []

    def train(scale: float) -> None:
        wrong.extend(
            scale
            for _ in range(10)
            if not torch.equal(gradient_of(scale * logits), expected[scale])
        )

    threads = [threading.Thread(target=train, args=(scale,)) for scale in scales]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# In processes of their own: memory is counted, and one forks.
SCRIPT = """
import os, resource, torch
from pathlib import Path
from pyvizllm.ops import cross_entropy

torch.set_num_threads(1)  # OpenMP's others are not there after a fork

def gradient_of(mebibytes, classes=1024):
    logits = torch.zeros(mebibytes * 2**18 // classes, classes, requires_grad=True)
    target = torch.zeros(len(logits), dtype=torch.int64)
    return torch.autograd.grad(cross_entropy(logits, target), logits)[0]

def mebibytes(file="/proc/self/statm"):
    return int(Path(file).read_text().split()[1]) * resource.getpagesize() / 2**20

gradient_of(2)  # what a first call needs
before = mebibytes()
"""


def run(script: str) -> None:
    command = [sys.executable, "-c", SCRIPT + script]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_of_gradients_that_have_become_small_is_given_back():
    run("""
gradient_of(256)
assert mebibytes() > before + 128, mebibytes() - before  # for the next step
for _ in range(64):
    gradient_of(1)
assert mebibytes() < before + 64, mebibytes() - before
""")


def test_a_gradient_that_malloc_keeps_memory_for_leaves_the_block_alone():
    run("""
gradient_of(40)
gradient_of(24)  # more than half of it
assert mebibytes() > before + 20, mebibytes() - before
""")


def test_what_is_larger_than_the_limit_is_not_kept():
    run("""
gradient_of(640, classes=2**20)
assert mebibytes() < before + 64, mebibytes() - before
""")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch refuses a backward in its child")
def test_a_forked_child_has_no_part_of_it():
    run("""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
gradient_of(256)
read, write = os.pipe()
child = os.fork()
if child == 0:
    try:
        expected = torch.full((512, 1024), 1 / 1024 / 512)
        expected[:, 0] -= 1 / 512
        torch.testing.assert_close(gradient_of(2), expected)
        os.write(write, str(mebibytes() - before).encode())
    finally:
        os._exit(0)
os.close(write)
more = os.read(read, 100)
os.waitpid(child, 0)
assert more and float(more) < 64, more
""")


NO_MEMORY = """
def limit(more):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = -1 if more is None else pages * resource.getpagesize() + more * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
"""


def test_memory_that_waits_is_no_reason_to_have_none():
    run(
        NO_MEMORY
        + """
small = torch.zeros(150 * 16, 2**14, requires_grad=True)
loss = cross_entropy(small, torch.zeros(len(small), dtype=torch.int64))
gradient_of(400)  # now it waits
limit(100)
loss.backward()
assert small.grad.shape == small.shape
"""
    )


def test_where_there_is_no_memory_torch_says_so():
    run(
        NO_MEMORY
        + """
logits = torch.zeros(2**17, 1024, requires_grad=True)
loss = cross_entropy(logits, torch.zeros(2**17, dtype=torch.int64))
limit(256)
try:
    loss.backward()
except RuntimeError as error:
    told = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
    assert ("tried to allocate 536870912 bytes" if told else "stderr") in str(error), error
else:
    raise AssertionError("expected an error")
limit(None)
cross_entropy(logits, torch.zeros(2**17, dtype=torch.int64)).backward()
assert logits.grad.shape == (2**17, 1024)
"""
    )
