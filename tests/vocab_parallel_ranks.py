"""One rank of test_vocab_parallel.py, and the cases that it and the test make in the same way.

python vocab_parallel_ranks.py RANK SIZE FOLDER: meets the other ranks over a file in the folder,
runs all cases and leaves what it got there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from oracle import logits_of_kind
from torch import Tensor

from pyvizllm import cross_entropy, linear_cross_entropy
from pyvizllm.ops.cross_entropy_arguments import is_dtensor
from pyvizllm.ops.vocab_parallel import vocab_parallel_cross_entropy
from pyvizllm.ops.vocab_parallel_linear import vocab_parallel_linear_cross_entropy

# Classes of each rank: a vector and a part of one; one class; none at all.
SLICES = {2: ((33, 17), (49, 1)), 3: ((1, 32, 17), (26, 0, 24))}
CLASSES = 50
# First and last classes of all those slices, and one within.
BORDERS = (0, 1, 25, 26, 32, 33, 48, 49, 40)
IGNORED = (3, 12)  # rows
HIDDEN = 24
CHUNK = 5  # tokens: the last of 18 is a part of one


@dataclass(frozen=True)
class Case:
    kind: str = "normal"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    edit: str = ""
    slices: int = 0  # which of SLICES
    times: int = 2  # BORDERS

    @property
    def ignore_index(self) -> int:
        return self.options.get("ignore_index", -100)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [rows, 50], targets [rows], upstream gradients of the loss [rows] or []."""
        generator = torch.Generator().manual_seed(29)
        target = torch.tensor(BORDERS * self.times)
        rows = len(target)
        logits = logits_of_kind(self.kind, rows, CLASSES, self.dtype, generator)
        if self.kind == "masked":  # half of the classes, but no target
            logits[torch.arange(rows), target] = 1.5
        if self.edit == "slices":  # one rank's, another's, and everybody's logits are all -Inf
            logits[0, 33:], logits[1, :33], logits[2] = -torch.inf, -torch.inf, -torch.inf
            target[:2] = torch.tensor([4, 45])
        elif self.edit == "poisoned":
            logits[0, 44], logits[1, 3], logits[2, 0] = torch.nan, torch.inf, torch.nan
        elif self.edit == "trained":  # targets are among the first of their rows
            logits[torch.arange(rows), target] += 2
        elif self.edit == "ignored":
            target[:] = -100
        none = self.options.get("reduction") == "none"
        upstream = torch.randn(rows if none else (), generator=generator)
        target[list(IGNORED)] = self.ignore_index
        return logits, target, upstream.to(self.dtype)

    def layer(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [18, 24], weight [50, 24] and bias [50]."""
        generator = torch.Generator().manual_seed(31)
        shapes = ((len(BORDERS) * 2, HIDDEN), (CLASSES, HIDDEN), (CLASSES,))
        made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        return made[0].to(self.dtype), (made[1] / 3).to(self.dtype), made[2].to(self.dtype)


BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
CASES = {
    "plain": Case(),
    "plain none": Case("wide", options={"reduction": "none"}),
    "smoothing": Case("peaked", options={"label_smoothing": 0.1, "reduction": "none"}),
    "smoothing bf16": Case("wide", BF16, {"label_smoothing": 0.3, "reduction": "sum"}),
    "z-loss": Case("shifted", options={"z_loss": 1e-4, "reduction": "sum"}),
    "z-loss and smoothing": Case(
        "wide", F64, {"z_loss": 1e-2, "label_smoothing": 0.2, "reduction": "none"}
    ),
    "cap": Case("wide", options={"softcap": 15.0, "reduction": "none"}),
    "cap and scale": Case(
        "wide", F64, {"softcap": 15.0, "logit_scale": -0.5, "label_smoothing": 0.1, "z_loss": 1e-3}
    ),
    "scale bf16": Case("wide", BF16, {"logit_scale": 0.25}, "trained"),
    "scaled and shifted": Case("shifted", options={"logit_scale": 7.0, "reduction": "none"}),
    "no scale": Case("wide", options={"logit_scale": 0.0}),
    # Nearly all logits are +-1 below the cap: their order is that before it.
    "saturated": Case("wide", options={"softcap": 1.0, "logit_scale": 1000.0}, slices=1),
    "masked": Case("masked", options={"reduction": "none"}, slices=1),
    "constant": Case("constant", BF16, slices=1),
    "f16": Case("wide", F16, {"reduction": "none"}, slices=1),
    "trained": Case("normal", edit="trained", slices=1),
    "trained bf16": Case("normal", BF16, edit="trained"),
    # More than torch sums in one thread, and no multiple of what we sum in one.
    "many rows": Case("normal", BF16, edit="trained", times=4001),
    "slices of -Inf": Case("normal", options={"reduction": "none"}, edit="slices"),
    "poisoned": Case("normal", options={"reduction": "none"}, edit="poisoned"),
    "all ignored": Case("normal", edit="ignored"),
    # Less its rank's first class, a target may be any number, and also ignore_index.
    "ignored class": Case("normal", options={"ignore_index": 1, "reduction": "none"}),
}
LINEAR_CASES = {
    "plain": Case(),
    "none": Case(dtype=F64, options={"reduction": "none", "label_smoothing": 0.1}, slices=1),
    "all options": Case(
        options={"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
    ),
    "bf16": Case(dtype=BF16, options={"label_smoothing": 0.1}),
    "bf16 none": Case(dtype=BF16, options={"reduction": "none"}),
}


def slice_of(tensor: Tensor, counts: tuple[int, ...], rank: int, dim: int) -> Tensor:
    """This rank's classes, as a leaf in memory of its own."""
    return tensor.split(counts, dim)[rank].clone().requires_grad_()


def run_case(case: Case, rank: int, size: int, **where: Any) -> dict[str, Any]:
    full, target, upstream = case.tensors()
    logits = slice_of(full, SLICES[size][case.slices], rank, 1)
    loss, metrics = vocab_parallel_cross_entropy(
        logits, target, **case.options, return_metrics=True, **where
    )
    alone = vocab_parallel_cross_entropy(logits, target, **case.options, **where)
    loss.backward(upstream, retain_graph=True)
    first, logits.grad = logits.grad, None
    loss.backward(upstream)
    again, logits.grad = logits.grad, None
    alone.backward(upstream)
    _, of_tokens = vocab_parallel_cross_entropy(
        full.split(SLICES[size][case.slices], 1)[rank],  # rows that are not contiguous
        target,
        **case.options,
        return_metrics="per_token",
        class_counts=SLICES[size][case.slices],
        **where,
    )
    return {
        "per token": vars(of_tokens.per_token),
        "loss": loss.detach(),
        "alone": alone.detach(),
        "grad": first,
        "again": again,
        "grad alone": logits.grad,
        "sums": metrics.sums,
    }


def run_linear(
    case: Case, rank: int, size: int, bias: bool = True, autocast: bool = False
) -> dict[str, Any]:
    _, target, upstream = case.tensors()
    counts = SLICES[size][case.slices]
    hidden, *layer = case.layer()
    hidden.requires_grad_()
    weight, shift = (slice_of(tensor, counts, rank, 0) for tensor in layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, metrics = vocab_parallel_linear_cross_entropy(
            hidden,
            weight,
            target,
            shift if bias else None,
            **case.options,
            return_metrics="per_token",
            chunk_size=CHUNK,
        )
    got: dict[str, Any] = {"loss": loss.detach(), "sums": metrics.sums}
    got["ranks"] = metrics.per_token.rank
    for suffix in ("", " again"):
        for tensor in (hidden, weight, shift):
            tensor.grad = None
        loss.backward(upstream, retain_graph=True)
        got["input" + suffix], got["weight" + suffix] = hidden.grad, weight.grad
        got["bias" + suffix] = shift.grad
    return got


def run_shapes(rank: int, size: int) -> dict[str, Tensor]:
    """[C], [N, C, d], targets of int32, no rows, and class_counts that are given."""
    counts = SLICES[size][0] if size == 3 else SLICES[size][1]  # a rank has one class
    full, target, _ = CASES["plain"].tensors()
    got = {}
    whole = {
        "vector": (full[0], target[0]),
        "vector of one target": (full[0], target[:1]),
        "images": (full.view(2, 9, CLASSES).movedim(-1, 1), target.view(2, 9).int()),
        "empty": (full[:0], target[:0]),
    }
    for name, (logits, index) in whole.items():
        dim = 0 if logits.dim() == 1 else 1
        local = slice_of(logits, counts, rank, dim)
        loss = vocab_parallel_cross_entropy(
            local, index, ignore_index=np.int64(-100), reduction="sum", class_counts=counts
        )
        loss.backward()
        got[name], got[name + " grad"] = loss.detach(), local.grad
    masked = full[0].where(torch.arange(CLASSES) != target[0], -torch.inf)
    local = slice_of(masked, counts, rank, 0)
    got["smoothed away"] = vocab_parallel_cross_entropy(local, target[0], label_smoothing=1.0)
    return got


def run_collectives(rank: int, size: int) -> dict[str, tuple[int, int]]:
    """All-gathers and all-reduces of forwards and backwards."""
    counts = SLICES[size][0]
    full, target, _ = CASES["plain"].tensors()
    hidden, *layer = LINEAR_CASES["plain"].layer()
    logits, weight = slice_of(full, counts, rank, 1), slice_of(layer[0], counts, rank, 0)
    hidden.requires_grad_()
    made = [0, 0]
    functions = (dist.all_gather, dist.all_reduce)

    def counted(which: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            made[which] += 1
            return functions[which](*arguments, **options)

        return call

    def count(call: Any) -> tuple[Any, tuple[int, int]]:
        made[:] = 0, 0
        return call(), (made[0], made[1])

    def linear(reduction: str) -> Tensor:
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, target, reduction=reduction, chunk_size=CHUNK, class_counts=counts
        )

    def metrics() -> Tensor:
        options = {"return_metrics": True, "class_counts": counts}
        return vocab_parallel_cross_entropy(logits, target, **options)[0]

    calls = {
        "plain": lambda: vocab_parallel_cross_entropy(logits, target, class_counts=counts),
        "asking": lambda: vocab_parallel_cross_entropy(logits, target),
        "metrics": metrics,
        "linear": lambda: linear("mean"),
        "linear none": lambda: linear("none"),
    }
    found = {}
    dist.all_gather, dist.all_reduce = counted(0), counted(1)
    try:
        for name, call in calls.items():
            loss, found[name] = count(call)
            _, found[name + " backward"] = count(loss.sum().backward)
    finally:
        dist.all_gather, dist.all_reduce = functions
    return found


def sentence(call: Any) -> str:
    try:
        call()
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_errors(rank: int, size: int) -> dict[str, str]:
    full, target, _ = CASES["plain"].tensors()
    logits = slice_of(full, SLICES[size][0], rank, 1)
    loss = vocab_parallel_cross_entropy

    def second_derivative() -> None:
        (grad,) = torch.autograd.grad(loss(logits, target), logits, create_graph=True)
        grad.sum().backward()

    high = target.clone()
    high[4] = CLASSES
    rows = len(target) - rank
    return {
        "target": sentence(lambda: loss(logits, high)),
        "rows": sentence(lambda: loss(logits[:rows], target[:rows])),
        "class_counts": sentence(lambda: loss(logits, target, class_counts=[7] * size)),
        "second derivative": sentence(second_derivative),
        "shape": sentence(lambda: loss(logits, target[:4])),
        "reduction": sentence(lambda: loss(logits, target, reduction="max")),
        "smoothing": sentence(lambda: loss(logits, target, label_smoothing=1.5)),
        "dtype": sentence(lambda: loss(logits.long(), target)),
        "probabilities": sentence(lambda: loss(logits, logits.detach())),
        "softcap": sentence(lambda: loss(logits, target, softcap=-1.0)),
        "tensor": sentence(lambda: loss(logits, target, z_loss=torch.tensor(0.1))),
    }


def run_linear_errors(rank: int, size: int) -> dict[str, str]:
    hidden, weight, _ = LINEAR_CASES["plain"].layer()
    weight = slice_of(weight, SLICES[size][0], rank, 0)
    target = CASES["plain"].tensors()[1]
    high = target.clone()
    high[4] = CLASSES

    def words(target: Tensor = target, weight: Tensor = weight, **options: Any) -> str:
        return sentence(
            lambda: vocab_parallel_linear_cross_entropy(hidden, weight, target, **options)
        )

    def second_derivative() -> None:
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, target)
        torch.autograd.grad(loss, weight, create_graph=True)

    return {
        "target": words(high),
        "shape": words(target[:4]),
        "weight": words(weight=weight.detach()[:, :-1]),
        "dtype": words(weight=weight.double()),
        "reduction": words(reduction="max"),
        "class_counts": words(class_counts=[7] * size),
        "second derivative": sentence(second_derivative),
    }


def run_dtensors(size: int) -> dict[str, Any]:
    assert not is_dtensor(torch.ones(1))
    assert "torch.distributed.tensor" not in sys.modules  # half a second
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    case = CASES["smoothing"]
    full, target, upstream = case.tensors()
    logits = distribute_tensor(full, mesh, [Shard(1)]).requires_grad_()
    loss, metrics = cross_entropy(logits, target, **case.options, return_metrics=True)
    assert isinstance(loss, DTensor)
    assert is_dtensor(loss)
    assert loss.placements == (Replicate(),)
    loss.backward(distribute_tensor(upstream, mesh, [Replicate()]))
    got = {
        "loss": loss.detach().to_local(),
        "grad": logits.grad.full_tensor(),
        "sums": metrics.sums,
    }
    by_rows = distribute_tensor(full, mesh, [Shard(0)])
    class_weight = torch.ones(CLASSES)
    errors = {
        "placements": sentence(lambda: cross_entropy(by_rows, target, z_loss=1.0)),
        "class weights": sentence(lambda: cross_entropy(logits, target, class_weight, z_loss=1.0)),
    }
    for placement in (Shard(0), Replicate()):  # torch's own function
        losses = []
        for function in (cross_entropy, torch.nn.functional.cross_entropy):
            logits = distribute_tensor(full, mesh, [placement]).requires_grad_()
            loss = function(logits, distribute_tensor(target, mesh, [placement]))
            loss.backward()
            losses.append((loss.detach().full_tensor(), logits.grad.full_tensor()))
        got[str(placement)] = losses
    hidden, weight, bias = LINEAR_CASES["plain"].layer()
    replicated = [distribute_tensor(t, mesh, [Replicate()]) for t in (hidden, weight, target, bias)]
    got["replicated"] = linear_cross_entropy(*replicated).full_tensor()
    shard = distribute_tensor(weight, mesh, [Shard(0)])
    calls = {
        "plain hidden states": lambda: linear_cross_entropy(hidden, shard, target),
        "plain bias": lambda: linear_cross_entropy(replicated[0], shard, target, bias),
        "replicated weight": lambda: linear_cross_entropy(*replicated, z_loss=1.0),
    }
    got["errors"] = errors | {name: sentence(call) for name, call in calls.items()}
    hidden = distribute_tensor(hidden, mesh, [Shard(0)]).requires_grad_()
    weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias))
    loss = linear_cross_entropy(hidden, weight, target, bias)
    loss.backward()
    got["linear"] = {
        "loss": loss.detach().to_local(),
        **{
            name: tensor.grad.full_tensor()
            for name, tensor in (("input", hidden), ("weight", weight), ("bias", bias))
        },
    }
    return got


def main(rank: int, size: int, folder: Path) -> None:
    # Results must not depend on the threads, and those of the ranks differ.
    torch.set_num_threads(1 + rank % 2)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    got: dict[str, Any] = {name: run_case(case, rank, size) for name, case in CASES.items()}
    got["linear"] = {name: run_linear(case, rank, size) for name, case in LINEAR_CASES.items()}
    got["linear without bias"] = run_linear(LINEAR_CASES["plain"], rank, size, bias=False)
    got["linear under autocast"] = run_linear(LINEAR_CASES["plain"], rank, size, autocast=True)
    got["shapes"] = run_shapes(rank, size)
    got["collectives"] = run_collectives(rank, size)
    got["errors"] = run_errors(rank, size)
    got["linear errors"] = run_linear_errors(rank, size)
    got["dtensor"] = run_dtensors(size)
    if size == 3:  # a group of two: its ranks are not those of all
        group = dist.new_group([1, 2])
        if rank > 0:
            got["group"] = run_case(CASES["smoothing"], rank - 1, 2, group=group)
        else:
            got["group"] = sentence(lambda: run_case(CASES["smoothing"], 0, 2, group=group))
    torch.save(got, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
