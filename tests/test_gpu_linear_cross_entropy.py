"""linear_cross_entropy on a GPU: the tests of the CPU, and what it takes of the device's memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_device import DEVICE, cuda_only, on_gpu
from test_linear_cross_entropy import (  # noqa: F401 - collected here, where the fixture names the device
    test_class_weights_of_float32_in_every_derivative,
    test_compiled_without_a_break,
    test_derivatives_twice,
    test_float16_gradients_of_a_confident_model,
    test_float16_gradients_wait_for_the_loss_scale,
    test_gradients_where_no_weight_counts,
    test_input_that_is_made_of_the_weight_differentiated_twice,
    test_loss_and_gradients,
    test_metrics_are_those_of_all_logits,
    test_metrics_of_each_token,
    test_module,
    test_no_token_counts,
    test_no_tokens,
    test_nothing_is_recorded_without_gradients,
    test_operator_is_what_it_says,
    test_options,
    test_tied_to_the_embedding,
    test_transforms_of_torch_func,
    test_upstream_gradients_and_retained_graphs,
    test_weight_gradient_is_summed_in_float32,
)

from pyvizllm import linear_cross_entropy

pytestmark = on_gpu


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@cuda_only
def test_memory_of_a_large_vocabulary():
    """8192 x 4096 x 128256 in bfloat16: at most 1.5 GB beside the gradients; logits take 2.1 GB."""
    x = torch.randn(8192, 4096, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(128256, 4096, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    target = torch.randint(128256, (8192,))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, w, target).backward()
    gradients = x.grad.nbytes + w.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.5e9


@cuda_only
def test_the_host_waits_for_nothing():
    x = torch.randn(300, 64, requires_grad=True)
    w = torch.randn(1000, 64, requires_grad=True)
    target = torch.randint(1000, (300,))
    linear_cross_entropy(x, w, target).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(x, w, target, chunk_size=128).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
