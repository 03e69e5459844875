"""A watched training on a GPU: nothing waits for the device, and the numbers are the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_device import DEVICE, cuda_only, on_gpu
from torch import Tensor, nn
from torch.nn import functional as F

import pyvizllm

pytest.importorskip("tensorboardX", reason="telemetry needs tensorboardX, which is not installed")
from watching import bins_of, norm, watching

pytestmark = on_gpu

OPTIMIZERS = {
    "ours": lambda parameters: pyvizllm.AdamW(parameters, lr=1e-2),
    "ours, clipping": lambda parameters: pyvizllm.AdamW(parameters, lr=1e-2, max_grad_norm=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(32, 16, generator=generator)
    return inputs.to(DEVICE), inputs[:, :8].argmax(1).to(DEVICE)


@cuda_only
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch, seen = watching(model, [optimizer], every=2)
    batches = [batch(seed) for seed in range(1, 7)]
    rate = torch.tensor(3.0, device=DEVICE)
    for step, (inputs, targets) in enumerate(batches, start=1):
        if step == 2:  # the first step makes state and scratch memory
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        watch.micro_batch(loss, size=32)
        if step > 3:
            pyvizllm.clip_grad_norm_(model.parameters(), 1.0)
        watch.log(loss=loss, rate=rate)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    watch.close()
    assert seen.published == [2, 4, 6]
    assert np.isfinite(seen.scalar("train/loss")).all()
    assert (seen.scalar("train/rate") == 3.0).all()


@pytest.fixture(autouse=True)
def _no_debug_mode_is_left_on() -> object:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_of_every_step(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch, seen = watching(model, [optimizer], every=3)
    names = [parameter for parameter, _ in model.named_parameters()]
    grads: dict[str, list[Tensor]] = {parameter: [] for parameter in names}
    updates: dict[str, list[Tensor]] = {parameter: [] for parameter in names}
    for step in range(1, 7):
        inputs, targets = batch(step)
        F.cross_entropy(model(inputs), targets).backward()
        before = [p.detach().clone() for p in model.parameters()]
        for parameter, tensor in model.named_parameters():
            grads[parameter].append(tensor.grad.clone())
        optimizer.step()
        for parameter, tensor, old in zip(names, model.parameters(), before, strict=True):
            updates[parameter].append(tensor.detach() - old)
        optimizer.zero_grad()
        assert watch.flush(60)
    watch.close()
    assert seen.published == [3, 6]
    for parameter in names:
        np.testing.assert_allclose(
            seen.statistic("grad", "norm", parameter),
            [norm([g]) for g in grads[parameter]],
            rtol=1e-6,
        )
        for publication, steps in enumerate((slice(0, 3), slice(3, 6))):
            np.testing.assert_array_equal(
                seen.counts(publication, "grad", parameter), bins_of(grads[parameter][steps])
            )
            published = updates[parameter][steps][-1:]  # updates are counted where they are shown
            np.testing.assert_array_equal(
                seen.counts(publication, "update", parameter), bins_of(published)
            )


def test_watching_changes_nothing() -> None:
    plain, watched = network(), network()
    for model in (plain, watched):
        optimizer = OPTIMIZERS["ours"](model.parameters())
        watch = watching(model, [optimizer], every=2)[0] if model is watched else None
        for step in range(1, 6):
            inputs, targets = batch(step)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        if watch is not None:
            watch.close()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
