"""The sketch against its definition in numpy, and what the theory of sketches promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyvizllm.ops import SKETCH_SIZE, sketch

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Less than a row, a row, rows and a part, a chunk of the CPU (65536) and of CUDA (32768), and more.
SIZES = (0, 1, 63, 64, 65, 1000, 32768, 65536 + 7, 200_003)
# float32 sums of 64 rows at most (128 on CUDA), each addition rounded; float64 beyond.
FLOAT_ERROR = 128 * 2.0**-24


def mix(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def reference(tensor: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """csrc/sketch.h, element by element; and the sums of magnitudes, for the rounding."""
    values = tensor.detach().double().reshape(-1).numpy()
    state = mix((seed + GOLDEN) & MASK)
    numbers, magnitudes = np.zeros(SKETCH_SIZE), np.zeros(SKETCH_SIZE)
    for row in range(-(-len(values) // SKETCH_SIZE)):
        own = values[row * SKETCH_SIZE : (row + 1) * SKETCH_SIZE]
        bits = mix((state + row * GOLDEN) & MASK)
        exchange = ((state ^ (row * 0xD1342543DE82EF95 & MASK)) * GOLDEN & MASK) >> 58
        signs = np.array([-1.0 if bits >> j & 1 else 1.0 for j in range(len(own))])
        places = np.arange(len(own)) ^ exchange
        numbers[places] += signs * own
        magnitudes[places] += np.abs(own)
    return numbers, magnitudes


def check(tensors: list[Tensor], seeds: list[int] | None = None) -> None:
    result = sketch(tensors, seeds=seeds)
    assert result.dtype == torch.float64
    assert result.shape == (len(tensors), SKETCH_SIZE)
    for row, tensor, seed in zip(result, tensors, seeds or range(len(tensors)), strict=True):
        numbers, magnitudes = reference(tensor, seed)
        error = 1e-13 if tensor.dtype == torch.float64 else FLOAT_ERROR
        assert (np.abs(row.numpy() - numbers) <= error * magnitudes + 1e-300).all(), tensor.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype):
    generator = torch.Generator().manual_seed(1)
    check([torch.randn(size, generator=generator).to(dtype) for size in SIZES])


def test_mixed_list_with_empties_views_and_seeds():
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(500, 130, generator=generator)
    tensors = [
        torch.empty(0),
        base.bfloat16()[1:],
        base.T,  # not contiguous
        base.reshape(-1)[3:4099],  # not aligned
        torch.tensor(2.5, dtype=torch.float64),
        base[:1].expand(7, 130),
        torch.empty(3, 0),
    ]
    check(tensors, seeds=[5, 2**40, -3, 7, 0, 5, 1])


def test_any_number_of_threads_and_any_neighbours_give_the_same_bits():
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(size, generator=generator) for size in SIZES]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = sketch(tensors)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sketch(tensors), single)
    assert torch.equal(sketch(tensors[6:7], seeds=[6]), single[6:7])


def structured(kind: str, size: int, generator: torch.Generator) -> Tensor:
    if kind == "normal":
        return torch.randn(size, generator=generator)
    if kind == "constant":
        return torch.ones(size)
    if kind == "one of 64 columns":
        return torch.randn(size // 64, generator=generator)[:, None] * torch.eye(64)[17]
    return torch.randn(size, generator=generator) * (torch.arange(size) % 1024 == 0)


@pytest.mark.parametrize("kind", ["normal", "constant", "one of 64 columns", "every 1024th"])
def test_products_are_estimated_without_bias_and_with_the_variance_of_theory(kind):
    """Over 2000 seeds, from 64 * 512 elements: 512 rows, 32 occupied places in the sparsest."""
    generator = torch.Generator().manual_seed(4)
    count, size = 2000, 64 * 512
    x, y = (structured(kind, size, generator).double().reshape(-1) for _ in range(2))
    y = 0.5 * x + y
    seeds = list(range(count))
    of_x, of_y = (sketch([value] * count, seeds=seeds) for value in (x, y))
    products = (of_x * of_y).sum(1) / (x.norm() * y.norm())
    true = float(x @ y / (x.norm() * y.norm()))
    # Of a sketch with independent signs and places: (1 + cos^2) / 64, and less without the squares
    # of single elements; 1.5 times that leaves room for places that are not independent.
    deviation = math.sqrt((1 + true**2) / SKETCH_SIZE)
    assert abs(float(products.mean()) - true) < 4 * deviation / math.sqrt(count)
    assert float(products.std()) < 1.5 * deviation
    squares = of_x.square().sum(1) / x.square().sum()
    assert abs(float(squares.mean()) - 1) < 4 * math.sqrt(2 / SKETCH_SIZE / count)
    assert float(squares.std()) < 1.5 * math.sqrt(2 / SKETCH_SIZE)


def test_it_is_linear():
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(10_000, generator=generator, dtype=torch.float64) for _ in range(2))
    combined = sketch([2 * x - y])
    torch.testing.assert_close(combined, 2 * sketch([x]) - sketch([y]), rtol=0, atol=1e-10)


def test_nan_and_inf_show():
    x = torch.zeros(64 * 3)
    x[70], x[130] = torch.nan, torch.inf
    numbers = sketch([x])[0]
    assert int(numbers.isnan().sum()) == 1
    assert int(numbers.isinf().sum()) == 1


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="sketch: expected at least one tensor, got an empty list"):
        sketch([])
    with pytest.raises(TypeError, match="sketch: expected a list of tensors, got Tensor"):
        sketch(torch.ones(2))
    with pytest.raises(TypeError, match=r"sketch: expected float32, .*, got torch.int64 at pos"):
        sketch([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="sketch: expected a seed for each of 1 tensors, got 2"):
        sketch([torch.ones(2)], seeds=[1, 2])


def test_operator():
    torch.library.opcheck(
        torch.ops.pyvizllm.sketch.default, ([torch.randn(9), torch.ones(70)], [1, 2])
    )
