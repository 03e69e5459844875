"""Ways to run an operation on a GPU that it must not notice: no sync, a graph, another stream.

`run` is a function of nothing that computes `outputs`, in fixed memory, from an input likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[], object]


def copies(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [output.clone() for output in outputs]


def assert_same_bits(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def without_synchronisation(run: Run) -> None:
    """Torch raises at whatever makes the host wait for the device."""
    run()  # the first call may load a kernel or ask for memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(run: Run, input: Tensor, values: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """A graph captured over one input gives, over others, what a call gives."""
    wanted = []
    for value in values:
        input.copy_(value)
        run()
        wanted.append(copies(outputs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for value, results in zip(values, wanted, strict=True):
        input.copy_(value)
        for output in outputs:
            output.fill_(3)
        graph.replay()
        assert_same_bits(outputs, results)


def on_a_side_stream(run: Run, input: Tensor, value: Tensor, outputs: Sequence[Tensor]) -> None:
    """The input arrives late, on the side stream; work on any other stream would not see it."""
    input.copy_(value)
    run()
    wanted = copies(outputs)
    input.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some 25 ms
        input.copy_(value)
        run()
        results = copies(outputs)
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(results, wanted)


def bits_while_the_device_is_busy(run: Run, outputs: Sequence[Tensor], runs: int = 20) -> None:
    """Blocks are placed otherwise when half of the multiprocessors have something else to do."""
    run()
    wanted = copies(outputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    other = torch.ones(1 << 22, device=outputs[0].device)
    for index in range(runs):
        with torch.cuda.stream(side):
            for _ in range(index):
                other.mul_(1.0)
        run()
        assert_same_bits(outputs, wanted)
    torch.cuda.synchronize()
