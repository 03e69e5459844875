"""What `pyvizllm.watch` costs a training on a GPU, and its own work against wandb.watch's way.

GPT-2 of 124 M parameters in bfloat16 autocast, 8 sequences of 1024 tokens a step. Fifty steps are
timed together, without a wait between them, as a training runs: they hold one publication.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_device import on_gpu
from gpu_timing import Gpu
from torch import nn
from ways import Unmoved, times, watch_as_wandb_does

import pyvizllm
from pyvizllm.models import GPT
from pyvizllm.models.gpt import GPTConfig

pytest.importorskip("tensorboardX", reason="telemetry needs tensorboardX, which is not installed")
pytestmark = on_gpu

GPT2 = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
TINY = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)
NORM = "torch._foreach_norm"
OPTIMIZERS = {
    "torch.optim.AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "pyvizllm.AdamW": lambda parameters: pyvizllm.AdamW(parameters, lr=1e-4),
}


def gpt2(gpu: Gpu) -> GPT:
    torch.manual_seed(0)
    return GPT(GPT2 if gpu.device == "cuda" else TINY).to(gpu.device)


def training_step(gpu: Gpu, model: GPT, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    config = GPT2 if gpu.device == "cuda" else TINY
    tokens = torch.randint(config.vocab_size, (8, config.block_size + 1), device=gpu.device)

    def step() -> None:
        with torch.autocast(gpu.device, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = pyvizllm.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_telemetrys_own_work(compare_gpu, gpu, tmp_path):
    """Gradients, parameters and updates of one step, published, everything on disk."""
    model = gpt2(gpu)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-4
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Unmoved(model.parameters())
    watch = pyvizllm.watch(model, optimizer, tmp_path, every=1)

    def ours() -> None:
        optimizer.step()
        watch.publish()
        watch.flush()

    def wandbs_way() -> None:
        watch_as_wandb_does([p.grad for p in parameters])
        watch_as_wandb_does(parameters)
        watch_as_wandb_does([p.detach() - q for p, q in zip(parameters, before, strict=True)])

    compare_gpu(
        "histograms of all gradients, parameters and updates of 124 M parameters, one step",
        ("watch, on disk", ours),
        {"wandb.watch's way": wandbs_way},
        clock="both",
        rounds=9,
        target={"wandb.watch's way": "50x"},
    )
    watch.close()


def test_handing_over_a_publication(compare_gpu, gpu, tmp_path):
    """2000 tensors, on the training thread alone: the device works on by itself."""
    model = nn.ParameterList([torch.randn(64, device=gpu.device) for _ in range(2000)])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = Unmoved(model.parameters())
    watch = pyvizllm.watch(model, optimizer, tmp_path, every=10**9)
    optimizer.step()

    def prepare() -> None:
        watch.flush()
        optimizer.step()

    compare_gpu(
        "handing over a publication of 2000 tensors, on the training thread",
        ("watch", watch.publish),
        {NORM: lambda: torch._foreach_norm([p.grad for p in model.parameters()])},
        clock="host",
        rounds=21,
        target={NORM: "ours under 1 ms"},
        before=prepare,
    )
    watch.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_with_the_defaults(compare_gpu, gpu, tmp_path, name):
    watched, plain = gpt2(gpu), gpt2(gpu)
    ours, theirs = OPTIMIZERS[name](watched.parameters()), OPTIMIZERS[name](plain.parameters())
    with pyvizllm.watch(watched, ours, tmp_path):
        compare_gpu(
            f"fifty steps of GPT-2 of 124 M parameters with {name}",
            ("watched", times(50, training_step(gpu, watched, ours))),
            {"no telemetry": times(50, training_step(gpu, plain, theirs))},
            clock="both",
            rounds=5,
            target={"no telemetry": "within 1 % (0.99x)"},
        )
