"""Where the first NaN or Inf is, against torch's own search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyvizllm.ops import decode_nonfinite, first_nonfinite_, tensor_stats

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BAD = (torch.nan, torch.inf, -torch.inf)


def new(count: int) -> Tensor:
    return torch.full((count,), -1, dtype=torch.int64)


def first(tensor: Tensor) -> int | None:
    places = (~torch.isfinite(tensor.reshape(-1))).nonzero()
    return int(places[0]) if len(places) else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 33, 32768, 32769, 70_001])
def test_each_place_that_a_chunk_has(dtype, size):
    for place in {0, 1, size // 2, size - 1}:
        if place >= size:
            continue
        x = torch.ones(size, dtype=dtype)
        x[place:] = torch.nan  # all later ones are bad too
        found = new(1)
        first_nonfinite_([x], tensor_stats([x]).counts, found)
        assert decode_nonfinite(int(found)) == (0, place)


def test_mixed_list():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.empty(0)]
    for index, dtype in enumerate(DTYPES * 3):
        x = torch.randn(1000 + 40_000 * (index % 3), generator=generator).to(dtype)
        if index % 4 != 3:
            places = torch.randint(len(x), (3,), generator=generator)
            x[places] = BAD[index % 3]
        tensors += [x, torch.empty(0)]
    matrix = torch.ones(5, 7)
    matrix[1, 3] = torch.inf
    tensors.append(matrix.T)  # not contiguous: [3, 1] of [7, 5] in row-major order
    found = new(len(tensors))
    first_nonfinite_(tensors, tensor_stats(tensors).counts, found, row=9)
    expected = [first(tensor) for tensor in tensors]
    assert [decode_nonfinite(value) for value in found.tolist()] == [
        None if index is None else (9, index) for index in expected
    ]
    assert expected[-1] == 3 * 5 + 1


def test_the_first_step_stays():
    healthy, late, early = torch.ones(100), torch.ones(100), torch.ones(40_000)
    found = new(3)
    for row in range(4):
        if row == 1:
            early[39_999] = torch.nan
        if row == 2:
            early[5] = torch.nan  # an earlier place in a later step
            late[7] = torch.inf
        tensors = [healthy, late, early]
        first_nonfinite_(tensors, tensor_stats(tensors).counts, found, row=row)
    assert [decode_nonfinite(value) for value in found.tolist()] == [None, (2, 7), (1, 39_999)]


def test_a_list_of_thousands():
    tensors = [torch.ones(3) for _ in range(2500)]
    tensors[2499][2] = tensors[1000][0] = torch.nan
    found = new(2500)
    first_nonfinite_(tensors, tensor_stats(tensors).counts, found)
    assert int(found[2499]) == 2
    assert int(found[1000]) == 0
    assert int((found == -1).sum()) == 2498


def test_errors_are_sentences():
    x = torch.ones(3)
    counts = tensor_stats([x]).counts
    with pytest.raises(ValueError, match="first_nonfinite_: expected at least one tensor"):
        first_nonfinite_([], counts, new(0))
    rows = torch.full((4, 8), torch.nan)
    with pytest.raises(TypeError, match="first_nonfinite_: expected a list of tensors, got Tensor"):
        first_nonfinite_(rows, tensor_stats(list(rows)).counts, new(4))
    with pytest.raises(RuntimeError, match=r"expected found to be a contiguous int64 .* \[1\]"):
        first_nonfinite_([x], counts, new(2))
    with pytest.raises(RuntimeError, match="expected counts to be tensor_stats' of the same 2"):
        first_nonfinite_([x, x], counts, new(2))
    with pytest.raises(RuntimeError, match=r"expected row in \[0, 2\*\*22\), got -1"):
        first_nonfinite_([x], counts, new(1), row=-1)


def test_operator():
    x = torch.tensor([1.0, torch.nan])
    arguments = ([x], tensor_stats([x]).counts, 0, new(1))
    torch.library.opcheck(torch.ops.pyvizllm.first_nonfinite_.default, arguments)
