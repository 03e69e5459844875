"""cross_entropy on a GPU: every path of the kernels, and what only a GPU can show.

Classes: 10 (less than a vector), 1000, 1024, 4096 (a tile), 32000 (Llama 2), 50257 (GPT-2: odd),
128256 (Llama 3), 152064 (Qwen), 262144 (Gemma 3), 1200001: rows that a warp, a block, several
blocks hold, and that none do.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu_device import DEVICE, cuda_only, on_gpu
from gpu_runs import (
    bits_while_the_device_is_busy,
    on_a_side_stream,
    replayed,
    without_synchronisation,
)
from oracle import assert_within_one_ulp, cross_entropy_oracle, logits_of_kind
from test_cross_entropy import MODES, Share
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy

pytestmark = on_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLASSES = (10, 1000, 1024, 4096, 32000, 50257, 128256, 152064, 262144, 1_200_001)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(43)


@pytest.fixture(autouse=True)
def default_device():
    with torch.device(DEVICE):
        yield


def calculate(logits: Tensor, target: Tensor, mode: str, **options) -> tuple[Tensor, ...]:
    """Loss [rows], metrics and gradient, of logits that are overwritten by the mode "inplace"."""
    parameter = torch.zeros((), requires_grad=True)
    kept: list[Tensor] = []
    x = Share.apply(parameter, logits)
    x.register_hook(kept.append)
    loss, metrics = cross_entropy(
        x, target, return_metrics=True, reduction="none", **MODES[mode], **options
    )
    loss.backward(torch.ones_like(loss))
    return loss.detach(), metrics.sums, kept[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_rows_of_every_length_and_alignment(classes, dtype, mode, generator):
    """The row stride is odd: each row starts at another offset from 16 bytes, and from `start`."""
    for start in (0, 1, 3, 8):
        stride = classes + 17 - classes % 2
        logits = logits_of_kind("wide", 6, stride, dtype, generator)[:, start : start + classes]
        target = torch.randint(classes, (6,), generator=generator)
        target[2], target[4] = -100, logits[4].argmax()
        oracle = cross_entropy_oracle(logits, target, torch.ones(6))
        counts = target != -100
        correct = (logits.argmax(1) == target)[counts].sum()
        largest = logits.double().abs().amax(1) + logits.double().amax(1).abs() + 16
        index = target.int() if start % 2 else target
        loss, sums, gradient = calculate(logits, index, mode)
        assert_within_one_ulp(loss, oracle.loss, largest * 2.0**-24)
        assert_within_one_ulp(gradient, oracle.gradient, oracle.internal)
        metrics = CrossEntropyMetrics(sums)
        assert metrics.tokens == 5
        assert metrics.correct == correct
        torch.testing.assert_close(
            metrics.log_sum_exp, oracle.log_sum_exp[counts].mean(), rtol=3e-6, atol=3e-6
        )
        torch.testing.assert_close(
            metrics.entropy, oracle.entropy[counts].mean(), rtol=3e-6, atol=3e-6
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rows", "classes"), [(70_001, 10), (9001, 1000), (5003, 5000), (400, 70_001)]
)
def test_more_rows_than_blocks(rows, classes, mode, generator):
    logits = torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.3] = -100
    x = logits.double().requires_grad_()
    expected = F.cross_entropy(x, target, reduction="none")
    expected.sum().backward()
    loss, sums, gradient = calculate(logits, target, mode)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), x.grad, rtol=2e-6, atol=1e-9)
    assert CrossEntropyMetrics(sums).tokens == (target != -100).sum()


def step(mode: str, dtype: torch.dtype = torch.bfloat16, rows: int = 300, classes: int = 5003):
    """A function of nothing from logits to gradient, its input and its outputs in fixed memory."""
    leaf = torch.zeros(rows, classes, dtype=dtype, requires_grad=True)
    gradient = torch.zeros(rows, classes, dtype=dtype)
    target = torch.arange(rows) % classes
    loss = torch.zeros(())

    def run() -> None:
        value = cross_entropy(leaf * 1.0, target, **MODES[mode])
        gradient.copy_(*torch.autograd.grad(value, leaf))
        loss.copy_(value.detach())

    return run, leaf, (loss, gradient)


@cuda_only
@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(mode):
    run, _, _ = step(mode)
    without_synchronisation(run)
    parameter = torch.randn(7, 33, requires_grad=True)
    target = torch.arange(7)

    def with_metrics() -> None:
        loss, metrics = cross_entropy(
            parameter * 1.0, target, label_smoothing=0.1, return_metrics=True, **MODES[mode]
        )
        (loss * 0.5).backward()
        assert metrics.accuracy.shape == ()

    without_synchronisation(with_metrics)


@cuda_only
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_graph_computes_on_new_inputs(mode, generator):
    run, leaf, outputs = step(mode)
    inputs = [torch.randn(leaf.shape, generator=generator).bfloat16() * 5 for _ in range(3)]
    replayed(run, leaf.data, inputs, outputs)


@cuda_only
@pytest.mark.parametrize("mode", MODES)
def test_work_is_queued_on_the_current_stream(mode, generator):
    run, leaf, outputs = step(mode, rows=4000)
    value = torch.randn(leaf.shape, generator=generator).bfloat16() * 5
    on_a_side_stream(run, leaf.data, value, outputs)


@cuda_only
@pytest.mark.parametrize("classes", [10, 5003, 140_001])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_in_20_runs_beside_other_work(mode, classes, generator):
    run, leaf, outputs = step(mode, rows=600, classes=classes)
    leaf.data.copy_(torch.randn(leaf.shape, generator=generator) * 5)
    bits_while_the_device_is_busy(run, outputs)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_do(mode):
    x = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy(x * 1.0, torch.zeros(0).long(), reduction="sum", **MODES[mode])
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, 5)


@cuda_only
@pytest.mark.parametrize("mode", MODES)
def test_more_than_2_to_the_31_elements(mode, generator):
    """70000 x 32000 bfloat16: 4.5 GB of logits; rows on both sides of the 2**31st element."""
    free, _ = torch.cuda.mem_get_info()
    if free < 30e9:
        pytest.skip(f"expected 30 GB of free GPU memory, got {free / 1e9:.0f}")
    rows, classes = 70_000, 32_000
    logits = torch.empty(rows, classes, dtype=torch.bfloat16)
    logits.normal_(generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    picked = torch.tensor([0, 2**31 // classes - 1, 2**31 // classes, 2**31 // classes + 1, -1])
    before = logits[picked].clone()
    loss, _, gradient = calculate(logits, target, mode)
    oracle = cross_entropy_oracle(before, target[picked], torch.ones(5))
    assert_within_one_ulp(loss[picked], oracle.loss, torch.full((5,), 1e-5))
    assert_within_one_ulp(gradient[picked], oracle.gradient, oracle.internal)
    del logits, gradient
    torch.cuda.empty_cache()


@pytest.mark.parametrize("mode", MODES)
def test_compiled_by_inductor_in_one_graph(mode, generator):
    torch._dynamo.reset()

    def forward(x: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(x * 2.0, target, **MODES[mode])

    compiled = torch.compile(forward, fullgraph=True)
    x = torch.randn(12, 33, generator=generator, requires_grad=True)
    target = torch.randint(33, (12,), generator=generator)
    (gradient,) = torch.autograd.grad(compiled(x, target), x)
    (wanted,) = torch.autograd.grad(F.cross_entropy(x * 2.0, target), x)
    torch.testing.assert_close(gradient, wanted)


def test_autocast_returns_float32(generator):
    logits = torch.randn(4, 9, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(9, (4,), generator=generator)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = cross_entropy(logits, target)
    wanted = F.cross_entropy(logits.detach().float(), target)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


@cuda_only
@pytest.mark.parametrize(("mode", "target"), [("recompute", 9), ("fused", -1), ("inplace", 2**40)])
def test_a_target_out_of_range_is_a_device_assertion(mode, target):
    """In a process of its own: after it, the device takes no more work from that process."""
    script = f"""
import torch
from pyvizllm import cross_entropy
x = torch.zeros(4, 9, device="cuda", requires_grad=True)
cross_entropy(x * 1.0, torch.tensor([0, 8, {target}, 1], device="cuda"), **{MODES[mode]})
torch.cuda.synchronize()
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    assert "target >= 0" in done.stderr + done.stdout


@cuda_only
@pytest.mark.parametrize("mode", MODES)
def test_on_a_device_that_is_not_the_current_one(mode):
    if torch.cuda.device_count() < 2:
        pytest.skip("expected two CUDA devices, got one")
    x = torch.randn(5, 33, device="cuda:1", requires_grad=True)
    loss = cross_entropy(x * 1.0, torch.arange(5, device="cuda:1"), **MODES[mode])
    loss.backward()
    wanted = F.cross_entropy(x.detach(), torch.arange(5, device="cuda:1"))
    torch.testing.assert_close(loss, wanted)
    assert x.grad.device == x.device
