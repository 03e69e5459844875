"""Metrics of cross_entropy against a float64 oracle computed from the same inputs.

Classes: 1 (no other class), 3 (all are among the first five), 10 (less than a vector), 17 (a vector
and one more), 1000 and 2049 (a block and one more). 40 rows, since bins of the calibration want to
be filled.
"""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, logits_of_kind, metrics_oracle
from torch import Tensor

from pyvizllm.ops import CrossEntropyMetrics, PerToken, cross_entropy

MODES = {"recompute": {}, "fused": {"fused": True}, "inplace": {"fused": True, "inplace": True}}
OPTIONS = {
    "plain": {},
    "loss only": {"label_smoothing": 0.3, "z_loss": 0.1},  # the metrics are those of plain
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": -0.6},
}
CLASSES = (1, 3, 10, 17, 1000, 2049)
ROWS = 40


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(17)


def logits_and_targets(
    classes: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Half of the targets are right; every seventh is ignored; some logits are equal."""
    logits = (logits_of_kind("normal", ROWS, classes, dtype, generator) * 3).to(dtype)
    if classes > 5:
        logits[:10] = logits[:10].round()
    random = torch.randint(classes, (ROWS,), generator=generator)
    target = logits.argmax(1).where(torch.rand(ROWS, generator=generator) < 0.5, random)
    target[::7] = -100
    return logits, target


def options_of_oracle(options: str) -> dict[str, float]:
    return {k: v for k, v in OPTIONS[options].items() if k in ("softcap", "logit_scale")}


def close(got: Tensor, expected: Tensor) -> None:
    """Float32 exponentials and their sums, of distances up to 20."""
    torch.testing.assert_close(got, expected, rtol=4e-6, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_of_sums(dtype, options, mode, generator):
    for classes in CLASSES:
        logits, target = logits_and_targets(classes, dtype, generator)
        weight = torch.rand(classes, generator=generator).to(dtype)  # of no concern to metrics
        oracle = metrics_oracle(logits, target, **options_of_oracle(options))
        x = logits.requires_grad_() * 1.0
        _, metrics = cross_entropy(
            x, target, weight, return_metrics=True, **OPTIONS[options], **MODES[mode]
        )
        expected = oracle.sums(target != -100)
        # What is counted is exact, but for confidences on the edge of a bin: there are none here.
        for counted in (0, 1, 6):
            assert metrics.sums[counted] == expected[counted]
        close(metrics.sums / metrics.tokens, expected / expected[0])
        assert metrics.per_token is None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_of_sums_with_probabilities(dtype, options, generator):
    for classes in CLASSES:
        logits, _ = logits_and_targets(classes, dtype, generator)
        target = torch.rand(ROWS, classes, generator=generator).to(dtype)
        if classes > 5:
            target[:5] = (target[:5] * 3).round()  # several are the largest; many are 0
        oracle = metrics_oracle(logits, target, **options_of_oracle(options))
        _, metrics = cross_entropy(logits, target, return_metrics="per_token", **OPTIONS[options])
        expected = oracle.sums(torch.ones(ROWS, dtype=torch.bool))
        size = max(1, classes / 10)  # probabilities that do not sum to 1: the loss is a long sum
        close(metrics.sums / metrics.tokens / size, expected / ROWS / size)
        close(metrics.per_token.loss / size, oracle.loss / size)
        assert torch.equal(metrics.per_token.rank, oracle.rank)


def test_oracle_of_properties(generator):
    logits, target = logits_and_targets(1000, torch.float32, generator)
    counts = target != -100
    oracle = metrics_oracle(logits, target)
    _, metrics = cross_entropy(logits, target, return_metrics=True)
    for name, values in (
        ("accuracy", (oracle.rank == 0).double()),
        ("top5_accuracy", (oracle.rank < 5).double()),
        ("loss", oracle.loss),
        ("entropy", oracle.entropy),
        ("log_sum_exp", oracle.log_sum_exp),
        ("top_probability", oracle.top_probability),
        ("margin", oracle.margin),
    ):
        close(getattr(metrics, name), values[counts].mean())
    close(metrics.perplexity, oracle.loss[counts].mean().exp())
    assert metrics.tokens == counts.sum()
    assert metrics.correct == (oracle.rank == 0)[counts].sum()
    bins = oracle.sums(counts)[8:].view(3, 15)
    close(metrics.calibration, bins)
    close(metrics.expected_calibration_error, (bins[1] - bins[2]).abs().sum() / counts.sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_of_tokens(dtype, options, mode, generator):
    """In the target's shape, with the class dimension in the middle."""
    for classes in (10, 2049):
        logits, target = logits_and_targets(classes, dtype, generator)
        oracle = metrics_oracle(logits, target, **options_of_oracle(options))
        x = (logits.requires_grad_() * 1.0).view(8, 5, classes).movedim(2, 1)
        _, metrics = cross_entropy(
            x, target.view(8, 5), return_metrics="per_token", **OPTIONS[options], **MODES[mode]
        )
        tokens, counts = metrics.per_token, target != -100
        assert tokens.loss.shape == tokens.entropy.shape == tokens.rank.shape == (8, 5)
        close(tokens.loss.view(-1), oracle.loss.where(counts, torch.nan))
        close(tokens.entropy.view(-1), oracle.entropy.where(counts, torch.nan))
        assert torch.equal(tokens.rank.view(-1), oracle.rank.where(counts, -1))


def test_oracle_of_tokens_at_infinity():
    """Masked classes, a masked target; and rows whose softmax is NaN. Only of the last one is there
    a first of the largest logits."""
    logits = torch.tensor(
        [
            [0.0, 1.0, -torch.inf, 2.0],
            [0.0, 1.0, -torch.inf, 2.0],
            [0.0, torch.nan, 1.0, 2.0],
            [0.0, torch.inf, 1.0, 2.0],
            [-torch.inf, -torch.inf, -torch.inf, -torch.inf],
        ]
    )
    target = torch.tensor([3, 2, 3, 1, 0])
    oracle = metrics_oracle(logits[:2], target[:2])
    _, metrics = cross_entropy(logits, target, return_metrics="per_token")
    assert metrics.per_token.rank.tolist() == [0, 3, -1, -1, 0]
    assert metrics.correct == 2
    assert metrics.tokens == 5
    assert metrics.per_token.loss[1].isposinf()
    assert metrics.per_token.loss[2:].isnan().all()
    assert metrics.per_token.entropy[2:].isnan().all()
    close(metrics.per_token.loss[0], oracle.loss[0])
    close(metrics.per_token.entropy[:2], oracle.entropy)
    assert metrics.calibration[0].sum() == 2  # a confidence that is NaN is in no bin


def test_one_token_has_scalars(generator):
    logits = torch.randn(7, generator=generator)
    for target in (torch.tensor(3), torch.tensor([3]), logits.softmax(0)):
        _, metrics = cross_entropy(logits, target, return_metrics="per_token")
        assert metrics.per_token.loss.shape == metrics.per_token.rank.shape == ()
        assert metrics.tokens == 1
    _, metrics = cross_entropy(logits[:0].view(0, 1), target[:0].long(), return_metrics="per_token")
    assert metrics.tokens == 0
    assert metrics.per_token.rank.shape == (0,)


def test_metrics_add_and_are_no_part_of_the_graph(generator):
    logits = torch.randn(8, 5, generator=generator, requires_grad=True)
    target = torch.tensor([-100, 0, 1, 2, 3, 4, 0, 1])
    for mode in ("recompute", "fused"):
        _, whole = cross_entropy(logits, target, return_metrics=True, **MODES[mode])
        _, first = cross_entropy(logits[:3], target[:3], return_metrics=True, **MODES[mode])
        _, second = cross_entropy(logits[3:], target[3:], return_metrics="per_token", **MODES[mode])
        assert not whole.sums.requires_grad
        assert not second.per_token.loss.requires_grad
        assert whole.sums.shape == (CrossEntropyMetrics.SIZE,)
        torch.testing.assert_close((first + second).sums, whole.sums)
        assert (first + second).per_token is None
        assert torch.equal(sum([first, second]).sums, (first + second).sums)
        assert first != second
        assert isinstance(second.per_token, PerToken)


def test_repr_has_names_and_shapes():
    """No numbers, which would have to come from the device."""
    logits, target = torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.int64)
    names = (
        "tokens, correct, accuracy, loss, perplexity, entropy, log_sum_exp, top_probability, "
        "top5_accuracy, margin, expected_calibration_error: [], calibration: [3, 15]"
    )
    _, metrics = cross_entropy(logits, target, return_metrics="per_token")
    assert repr(metrics) == f"CrossEntropyMetrics({names}, per_token: [2, 3], device: cpu)"
    both = repr(metrics + metrics)
    assert both == f"CrossEntropyMetrics({names}, per_token: None, device: cpu)"


def test_constant_rows_are_not_all_correct():
    logits = torch.zeros(100, 50)
    _, metrics = cross_entropy(logits, torch.arange(100) % 50, return_metrics=True)
    assert metrics.correct == 2  # the argmax of equal logits is the first
    assert metrics.sums[6] == 10  # and the first five are the first five
    assert metrics.margin == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_composition_has_the_metrics_of_the_kernels(options, generator):
    """Where the probabilities require grad, and inside a transform of torch.func."""
    logits, target = logits_and_targets(17, torch.float64, generator)
    probabilities = torch.rand(ROWS, 17, generator=generator, dtype=torch.float64)

    def values(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss, metrics = cross_entropy(
            logits, target, return_metrics="per_token", **OPTIONS[options]
        )
        tokens = metrics.per_token
        return loss, metrics.sums, tokens.loss, tokens.entropy, tokens.rank

    for got, expected in (
        (torch.func.vmap(values)(logits[None], target[None]), values(logits, target)),
        (values(logits, probabilities.clone().requires_grad_()), values(logits, probabilities)),
    ):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.view(other.shape), other, equal_nan=True)


@pytest.mark.parametrize("row", [[-torch.inf] * 4, [0.0, torch.inf, 1.0, 2.0], [torch.nan] * 4])
def test_composed_metrics_of_rows_without_a_softmax(row: list[float]) -> None:
    """NaN where the kernels say NaN, -Inf where they say -Inf."""
    logits = torch.tensor([row, [3.0, 1.0, 0.0, -torch.inf]])
    probabilities = torch.full((2, 4), 0.25)
    _, kernels = cross_entropy(logits, probabilities, return_metrics=True)
    probabilities.requires_grad_()  # which the kernels cannot differentiate
    _, composed = cross_entropy(logits, probabilities, return_metrics=True)
    close(composed.sums, kernels.sums)
