"""The memory of the logits' gradients on the CPU, which is kept from one step to the next."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyvizllm.ops import cross_entropy

MODES = [{}, {"fused": True}]
MEGABYTE = 2**20


def logits_of(megabytes: int, *, classes: int = 1024) -> tuple[Tensor, Tensor]:
    """float32 logits of so many megabytes, and their targets."""
    rows = megabytes * MEGABYTE // 4 // classes
    return torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))


def gradient_of(logits: Tensor, target: Tensor, **options: bool) -> Tensor:
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target, **options), logits)
    return gradient


def resident() -> float:
    """Megabytes of this process in the machine's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MEGABYTE


@pytest.mark.parametrize("options", MODES)
def test_a_gradient_that_is_gone_leaves_its_memory_to_the_next(options):
    logits, target = logits_of(4)
    gradient = gradient_of(logits, target, **options)
    address, expected = gradient.data_ptr(), gradient.clone()
    del gradient
    again = gradient_of(logits, target, **options)
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


@pytest.mark.parametrize("options", MODES)
def test_a_gradient_that_is_in_use_keeps_its_memory(options):
    logits, target = logits_of(4)
    first = gradient_of(logits, target, **options)
    expected, view = first.clone(), first[-1]
    second = gradient_of(2 * logits.detach().requires_grad_(), target, **options)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, expected)
    del first  # its last row is still in use
    third = gradient_of(3 * logits.detach().requires_grad_(), target, **options)
    assert third.data_ptr() != view.data_ptr() - view.storage_offset() * 4
    assert torch.equal(view, expected[-1])


def test_a_large_block_is_given_back_when_gradients_become_small():
    logits, target = logits_of(256)
    before = resident()
    del_me = gradient_of(logits, target)
    assert resident() > before + 240
    del del_me
    assert resident() > before + 240  # for the next step
    gradient_of(*logits_of(2))
    assert resident() < before + 100


def test_what_is_larger_than_the_limit_is_not_kept():
    logits, target = logits_of(640, classes=2**20)
    before = resident()
    gradient_of(logits, target)
    assert resident() < before + 100


def test_gradients_of_changing_sizes_and_dtypes():
    torch.manual_seed(0)
    for rows in (1200, 700, 2000, 300, 1999, 5000, 1, 600):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            logits = torch.randn(rows, 1000, dtype=dtype, requires_grad=True)
            target = torch.randint(1000, (rows,))
            ours = gradient_of(logits, target)
            exact = logits.detach().double().requires_grad_()
            torch.nn.functional.cross_entropy(exact, target).backward()
            assert (ours.shape, ours.stride(), ours.dtype) == (logits.shape, (1000, 1), dtype)
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}[dtype]
            torch.testing.assert_close(ours.double(), exact.grad, rtol=tolerance, atol=1e-12)


def test_threads_never_share_a_block():
    logits = [(k + 1) * logits_of(2)[0].detach() for k in range(4)]
    target = torch.zeros(len(logits[0]), dtype=torch.int64)
    expected = [gradient_of(x.clone().requires_grad_(), target) for x in logits]
    wrong: list[int] = []

    def train(k: int) -> None:
        for _ in range(60):
            gradient = gradient_of(logits[k].clone().requires_grad_(), target)
            if not torch.equal(gradient, expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=train, args=(k,)) for k in range(len(logits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_and_its_parent_have_their_own():
    logits, target = logits_of(2)
    expected = gradient_of(logits, target).clone()  # the block is kept now
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's others are not there after a fork
        same = torch.equal(gradient_of(logits, target), expected)
        gradient_of(5 * logits.detach().requires_grad_(), target)
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(gradient_of(logits, target), expected)
