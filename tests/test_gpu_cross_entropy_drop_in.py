"""cross_entropy in torch's place, on a GPU: the tests of test_cross_entropy_drop_in.py."""

from __future__ import annotations

import pytest
from gpu_device import DEVICE, on_gpu

pytest.importorskip("expecttest", reason="expected expecttest, which torch's own tests need")

from test_cross_entropy_drop_in import (  # noqa: F401
    test_assigned_over_torchs,
    test_deterministic_mode,
    test_dtypes_are_torchs,
    test_error_inputs_of_torchs_modules,
    test_samples_of_torchs_module,
    test_samples_of_torchs_nll_loss,
    test_samples_of_torchs_tests,
)

pytestmark = on_gpu


@pytest.fixture
def device() -> str:
    return DEVICE
