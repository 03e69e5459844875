"""The tests of the operations once more, on a GPU: same inputs, same tolerances, same oracle.

Their tensors are made on the default device and from the generator of a fixture: here both are the
GPU's. What only a GPU can show is in test_gpu_cross_entropy.py and test_gpu_tensor_stats.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_device import DEVICE, on_gpu
from test_cross_entropy import (  # noqa: F401 - collected here, where the fixtures name the device
    test_accumulates_over_a_retained_graph_when_only_views_are_between,
    test_all_ignored,
    test_any_upstream_gradient,
    test_compiles_without_a_graph_break,
    test_ignore_index_may_be_any_number,
    test_inplace_leaves_what_is_outside_its_view_alone,
    test_inplace_with_the_class_dimension_moved_to_the_middle,
    test_inplace_writes_over_the_logits_and_says_so,
    test_log_sum_exp_minus_logit_does_not_cancel,
    test_masked_target_has_infinite_loss_as_in_torch,
    test_nan_and_inf_poison_their_row_as_in_torch,
    test_no_gradient_wanted,
    test_operators_keep_torchs_contracts,
    test_oracle_loss_and_gradient,
    test_oracle_options_and_reductions,
    test_rows_further_apart_than_2_to_the_31_elements,
    test_second_backward_over_a_retained_graph_is_the_same,
    test_second_derivative,
    test_shapes_are_torchs,
)
from test_cross_entropy_kernels import (  # noqa: F401
    test_mean_is_divided_by_the_weights_of_the_targets,
    test_nan_logits_are_never_correct_and_have_no_rank,
    test_oracle_of_a_slice_of_the_classes,
    test_oracle_of_options_and_targets,
    test_oracle_of_records_and_metrics,
    test_zero_probability_of_a_masked_class_costs_nothing,
)
from test_cross_entropy_metrics import (  # noqa: F401
    test_constant_rows_are_not_all_correct,
    test_metrics_add_and_are_no_part_of_the_graph,
    test_one_token_has_scalars,
    test_oracle_of_sums,
    test_oracle_of_sums_with_probabilities,
    test_oracle_of_tokens,
    test_oracle_of_tokens_at_infinity,
)
from test_cross_entropy_transforms import (  # noqa: F401
    test_compiles_a_transform,
    test_compiles_once_for_all_batches,
    test_transforms_of_torch_func,
)
from test_tensor_stats import (  # noqa: F401
    test_a_lone_empty_tensor,
    test_accumulates_into_a_given_histogram,
    test_agrees_with_torchs_norm,
    test_counts_beyond_float_precision,
    test_layouts,
    test_one_huge_tensor_among_thousands_of_small,
    test_one_nan_or_inf_shows,
    test_operator_keeps_torchs_contract,
    test_oracle_every_float16_and_bfloat16_value,
    test_oracle_mixed_list_with_empties,
    test_oracle_statistics_and_histogram,
    test_without_histogram,
)

pytestmark = [
    *on_gpu,
    # torch's own first use of forward-mode compiles with a deprecated function.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(41)


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # one of them takes 9 GB
