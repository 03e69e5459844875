"""The tests of AdamW once more, with the CUDA kernels in the place of the CPU ones.

As test_cuda_on_cpu.py does for the other operations: same inputs, same tolerances. The tests of
layouts are left out: what is not contiguous is copied before any kernel sees it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_on_cpu.emulator import Kernels
from test_optim import (  # noqa: F401 - collected here, where the fixtures replace kernels
    test_dtypes_and_options_differ_from_group_to_group,
    test_oracle_float32_error_is_no_larger_than_torchs,
    test_oracle_float64_agrees_with_torchs,
    test_oracle_infinite_and_nan_second_moments_are_torchs,
    test_oracle_low_precision_error_is_no_larger_than_torchs,
)
from test_optim_collect import (  # noqa: F401
    test_a_step_with_a_bad_gradient_changes_nothing,
    test_clipping_is_clip_grad_norm,
    test_gradients_are_unscaled_before_they_are_read,
    test_histograms_are_handed_over,
    test_only_what_is_asked_for,
    test_oracle_statistics_and_histograms,
    test_oracle_statistics_of_broken_and_extreme_steps,
    test_oracle_statistics_with_master_weights,
    test_rows_stay_in_the_order_of_the_parameters,
)
from test_optim_state import (  # noqa: F401
    test_master_weights_take_steps_too_small_for_bfloat16,
    test_moments_of_float32_gradients_and_bfloat16_parameters,
)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(59)


@pytest.fixture(autouse=True)
def cuda_kernels(kernels: Kernels) -> Iterator[None]:
    kernels.schedule("forward")
    with kernels.installed():
        yield
