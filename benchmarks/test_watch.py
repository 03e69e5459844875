"""What `pyvizllm.watch` costs a training, and its own work against what people run today.

A GPT of 10.7 million parameters on two cores; the steps with and without telemetry take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from ways import Unmoved, times, watch_as_wandb_does

import pyvizllm
from pyvizllm.models import GPT
from pyvizllm.models.gpt import GPTConfig

CONFIG = GPTConfig(vocab_size=256, block_size=128, n_layer=6, n_head=6, n_embd=384)
BATCH = 8  # 1024 tokens a step, as in the demo
OPTIMIZERS = {
    "torch.optim.AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "pyvizllm.AdamW": lambda parameters: pyvizllm.AdamW(parameters, lr=1e-4),
}


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    tokens = torch.randint(256, (BATCH, CONFIG.block_size + 1))

    def step() -> None:
        logits = model(tokens[:, :-1])
        loss = pyvizllm.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_the_defaults(compare, tmp_path, name):
    torch.manual_seed(0)
    watched, plain = GPT(CONFIG), GPT(CONFIG)
    ours, theirs = OPTIMIZERS[name](watched.parameters()), OPTIMIZERS[name](plain.parameters())
    with pyvizllm.watch(watched, ours, tmp_path):
        compare(
            f"a step of a GPT of 10.7 M parameters with {name}",
            ("watched", training_step(watched, ours)),
            {"no telemetry": training_step(plain, theirs)},
            rounds=120,  # two publications
            target={"no telemetry": "within 1 % (0.99x)"},
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_histogram_every_ten_steps(compare, tmp_path, name):
    torch.manual_seed(0)
    watched, plain = GPT(CONFIG), GPT(CONFIG)
    ours, theirs = OPTIMIZERS[name](watched.parameters()), OPTIMIZERS[name](plain.parameters())
    with pyvizllm.watch(watched, ours, tmp_path, every=10):
        compare(
            f"ten steps of it with {name}, every histogram of every parameter published once",
            ("watched", times(10, training_step(watched, ours))),
            {"no telemetry": times(10, training_step(plain, theirs))},
            rounds=9,
            target={"no telemetry": "within 4 % (0.96x)"},
        )


def test_a_small_model(compare, tmp_path):
    """What a step costs at least: nearly all of it is calls, not arithmetic."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 20), torch.randint(5, (32,))

    def steps(watch: bool) -> Callable[[], None]:
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
        optimizer = torch.optim.AdamW(model.parameters())
        handle = pyvizllm.watch(model, optimizer, tmp_path) if watch else None

        def step() -> None:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if handle is not None:
                handle.log(loss=loss)

        return times(100, step)

    compare(
        "a hundred steps of an MLP of 1,669 parameters, two publications",
        ("watched", steps(True)),
        {"no telemetry": steps(False)},
        rounds=21,
    )


def test_telemetrys_own_work(compare, tmp_path):
    """Gradients, parameters and updates of one step, published, everything on disk."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-4
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Unmoved(model.parameters())
    watch = pyvizllm.watch(model, optimizer, tmp_path / "watch", every=1)
    writer = SummaryWriter(str(tmp_path / "tensorboardX"))

    def kinds() -> Iterator[tuple[str, list[Tensor]]]:
        yield "grad", [parameter.grad for parameter in parameters]
        yield "param", [parameter.detach() for parameter in parameters]
        yield "update", [p.detach() - q for p, q in zip(parameters, before, strict=True)]

    def ours() -> None:
        optimizer.step()
        watch.publish()
        watch.flush()

    def wandbs_way() -> None:
        for _, tensors in kinds():
            watch_as_wandb_does(tensors)

    def add_histograms() -> None:
        for kind, tensors in kinds():
            for index, tensor in enumerate(tensors):
                writer.add_histogram(f"{kind}/{index}", tensor, 0)
        writer.flush()

    compare(
        "histograms of all gradients, parameters and updates of 10.7 M parameters, one step",
        ("watch, on disk", ours),
        {"wandb.watch's way": wandbs_way, "tensorboardX add_histogram": add_histograms},
        rounds=9,
        target={"wandb.watch's way": "50x", "tensorboardX add_histogram": "100x"},
    )
    watch.close()
    writer.close()


def test_publication_of_2000_tensors(compare, tmp_path):
    """What the training thread spends on handing a publication over: asked is under 1 ms."""
    model = nn.ParameterList([torch.randn(64) for _ in range(2000)])
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = Unmoved(model.parameters())
    watch = pyvizllm.watch(model, optimizer, tmp_path / "watch", every=10**9)
    writer = SummaryWriter(str(tmp_path / "tensorboardX"))
    optimizer.step()

    def publish() -> None:
        watch.publish()

    def prepare() -> None:
        watch.flush()
        optimizer.step()

    def add_histograms() -> None:
        for index, parameter in enumerate(parameters):
            writer.add_histogram(f"grad/{index}", parameter.grad, 0)

    compare(
        "handing over a publication of 2000 tensors, on the training thread",
        ("watch", publish),
        {"tensorboardX add_histogram": add_histograms},
        rounds=9,
        target={"tensorboardX add_histogram": "ours under 1 ms"},
        before=prepare,
    )
    watch.close()
    writer.close()
