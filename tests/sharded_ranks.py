"""The processes of test_sharded_parameters.py: they watch trainings of sharded parameters.

python sharded_ranks.py SIZE FOLDER: each does all trainings and leaves, by name, what was published
and what torch's own whole tensors were. They are forked: torch takes seconds to start.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import pyvizllm
from pyvizllm.telemetry import part_exchange

STEPS, EVERY = 5, 2  # the last publication, of one step, is that of `close`


class Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.publications: list[Any] = []

    def write(self, publication: Any) -> None:
        self.publications.append(
            {
                "step": publication.step,
                "scalars": dict(publication.scalars),
                "findings": [finding.text for finding in publication.findings],
                "histograms": {
                    tag: (table.counts[i].copy(), table.moments[i].copy())
                    for table in publication.histograms
                    for i, tag in enumerate(table.tags)
                },
            }
        )

    def flush(self) -> None: ...

    def close(self) -> None: ...


def whole(tensor: Tensor) -> Tensor:
    """A copy, as a plain tensor; all processes have to ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def model() -> nn.Module:
    """5 and 3 rows: of four processes one or more have none, and others fewer than the first."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))


def trained(
    module: nn.Module,
    folder: Path,
    *,
    before: Callable[[int], None] = lambda step: None,
    during: Callable[[int, pyvizllm.telemetry.Watch], None] = lambda step, watch: None,
    clip: bool = False,
    scaled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The publications of a training, the messages, and the whole tensors of each step."""
    kept, messages = Kept(), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pyvizllm").addHandler(handler)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    named = dict(module.named_parameters())
    steps = []
    with pyvizllm.watch(
        module, optimizer, folder, **({"every": EVERY} | options), sinks=[kept]
    ) as watch:
        for step in range(1, STEPS + 1):
            generator = torch.Generator().manual_seed(step)  # of all processes
            loss = module(torch.randn(4, 6, generator=generator)).square().sum()
            scaler.scale(loss).backward()
            before(step)
            scaler.unscale_(optimizer)
            seen = {"grad": {n: whole(p.grad) for n, p in named.items()}}
            seen["before"] = {n: whole(p) for n, p in named.items()}
            if clip:
                norm = pyvizllm.clip_grad_norm_(module.parameters(), 0.01)
                seen["norm"] = whole(norm)
                watch.log(norm=norm.full_tensor() if isinstance(norm, DTensor) else norm)
            during(step, watch)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen["after"] = {n: whole(p) for n, p in named.items()}
            steps.append(seen)
    logging.getLogger("pyvizllm").removeHandler(handler)
    return {"publications": kept.publications, "messages": messages, "steps": steps}


def sharded(module: nn.Module, *children: int, **options: Any) -> nn.Module:
    for child in children:
        fully_shard(module[child], **options)
    if not children:
        fully_shard(module, **options)
    return module


def with_nan(module: nn.Module) -> Callable[[int], None]:
    """In step 3 the whole gradient of 0.weight has a NaN at [4, 2], and an Inf after it."""

    def put(step: int) -> None:
        gradient = module[0].weight.grad
        rows = gradient.to_local()
        if step == 3 and dist.get_rank() == 2:  # whose only row is the last
            rows[0, 2], rows[0, 3] = float("nan"), float("inf")

    return put


def late(step: int, watch: pyvizllm.telemetry.Watch) -> None:
    """Publishers are busy, each at another time: they take their counts later than the others."""
    if step % dist.get_world_size() == dist.get_rank():
        watch.publisher.submit(lambda: time.sleep(0.3))


def side_by_side(folder: Path) -> list[list[float]]:
    """The norms that two watches of equal parameters show, one of gradients 100 times as large.

    In the second process the first watch's publisher is late, and the other one sends first.
    """
    seen = []
    with ExitStack() as stack:
        parts = []
        for factor in (1, 100):
            module, kept = sharded(model()), Kept()
            optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
            watch = pyvizllm.watch(module, optimizer, folder / str(factor), every=1, sinks=[kept])
            parts.append((module, optimizer, stack.enter_context(watch), factor))
            seen.append(kept)
        if dist.get_rank() == 1:
            parts[0][2].publisher.submit(lambda: time.sleep(0.5))
        for module, optimizer, _, factor in parts:
            (factor * module(torch.ones(4, 6)).square().sum()).backward()
            optimizer.step()
    norms = ([p["scalars"].get("train/grad_norm") for p in kept.publications] for kept in seen)
    return [[norm for norm in some if norm is not None] for some in norms]


def older(folder: Path) -> dict[str, Any]:
    """The messages and the tags of a training with FullyShardedDataParallel."""
    kept, messages = Kept(), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pyvizllm").addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it says itself that it is old
        module = FullyShardedDataParallel(
            model(), use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
        with pyvizllm.watch(module, optimizer, folder, every=1, sinks=[kept]):
            module(torch.ones(4, 6)).sum().backward()
            optimizer.step()
    logging.getLogger("pyvizllm").removeHandler(handler)
    return {"messages": messages, "tags": [*kept.publications[0]["scalars"]]}


def two_ways(grid: Any) -> nn.Module:
    """Rows cut by tensor parallelism and then by fully_shard, whose parts are slices of those."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    parallelize_module(module, grid["columns"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return sharded(module, mesh=grid["rows"])


def with_nan_in_two_ways(module: nn.Module) -> Callable[[int], None]:
    """In step 3 the whole gradient of 0.weight has a NaN at [3, 2]."""

    def put(step: int) -> None:
        rows = module[0].weight.grad.to_local()  # of [8, 6] this process's 2
        if step == 3 and dist.get_rank() == 2:  # the second of the first column's
            rows[1, 2] = float("nan")

    return put


def averaged(module: nn.Module, plain: Sequence[Tensor]) -> Callable[[int], None]:
    def average(step: int) -> None:
        for parameter in plain:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    return average


def tensor_parallel(mesh: Any) -> nn.Module:
    """The layer norm's gradients are Partial, the biases of RowwiseParallel replicated."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6))
    plan = {
        "0": SequenceParallel(sequence_dim=0),
        "1": ColwiseParallel(input_layouts=Shard(0)),
        "2": RowwiseParallel(),
    }
    return parallelize_module(module, mesh, plan)


def sentence(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(folder: Path) -> dict[str, str]:
    module = sharded(model())
    module(torch.ones(1, 6)).sum().backward()
    gradient = module[0].weight.grad
    replicated = gradient.sum().redistribute(placements=[Replicate()])
    with pyvizllm.watch(module, None, folder) as watch:
        return {
            "log": sentence(lambda: watch.log(total=gradient.sum())),
            "log replicated": sentence(lambda: watch.log(total=replicated)),
            "tensor_stats": sentence(lambda: pyvizllm.tensor_stats([gradient])),
        }


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    got: dict[str, Any] = {}
    part_exchange.PATIENCE = 30.0  # on a busy machine
    got["whole"] = trained(sharded(model()), folder / "whole")
    flat = init_device_mesh("cpu", (size,))
    grid = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    got["replicas"] = trained(sharded(model(), mesh=grid), folder / "replicas", clip=True)
    module = sharded(model(), 0, 2)
    plain = list(module[4].parameters())
    got["mixed"] = trained(module, folder / "mixed", before=averaged(module, plain))
    module = sharded(model())
    got["nan"] = trained(module, folder / "nan", before=with_nan(module))
    module = sharded(model())
    got["skipped"] = trained(
        module, folder / "skipped", before=with_nan(module), clip=True, scaled=True
    )
    got["tensor parallel"] = trained(tensor_parallel(flat), folder / "tp")
    cross = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("rows", "columns"))
    module = two_ways(cross)
    got["two ways"] = trained(module, folder / "ways", before=with_nan_in_two_ways(module))
    got["late"] = trained(sharded(model()), folder / "late", during=late, every=1)
    got["side by side"] = side_by_side(folder / "beside")
    got["older"] = older(folder / "older")
    got["budget"] = trained(sharded(model()), folder / "budget", max_overhead=1e-6)
    got["errors"] = errors(folder / "errors")
    part_exchange.PATIENCE = 0.2
    if rank == 1:  # its watch publishes at other steps
        got["others"] = trained(sharded(model()), folder / "others", every=3)
    else:
        got["others"] = trained(sharded(model()), folder / "others")
    torch.save(got, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    size, context = int(sys.argv[1]), multiprocessing.get_context("fork")
    processes = [
        context.Process(target=main, args=(rank, size, Path(sys.argv[2]))) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(process.exitcode != 0 for process in processes))
