"""The history of steps: what it keeps, what it forgets, and how columns line up."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from pyvizllm.telemetry.history import History, step_losses
from pyvizllm.telemetry.records import KINDS, STATISTICS, Kind, MicroBatches, Steps

NUMEL = STATISTICS.index("numel")


def made(
    first: int, rows: int, names: Iterable[str], *, kinds: tuple[Kind, ...] = KINDS, seed: int = 0
) -> Steps:
    """Steps of random positive statistics, with 7 elements a parameter."""
    names = tuple(names)
    random = np.random.default_rng((seed, first))
    statistics = {kind: random.random((rows, len(STATISTICS), len(names))) for kind in kinds}
    for table in statistics.values():
        table[:, NUMEL] = 7
    return Steps(first, names, statistics, np.arange(first, first + rows, dtype=np.float64))


def test_the_last_steps_are_kept_over_chunks_of_any_size() -> None:
    history, all_norms = History(limit=20), np.empty((0, 2))
    first = 1
    for rows in (5, 1, 8, 13, 30, 2, 1, 3, 64, 7):
        chunk = made(first, rows, "ab")
        history.append(chunk)
        first += rows
        all_norms = np.concatenate((all_norms, chunk.statistic("grad", "norm")))
        kept = min(20, len(all_norms))
        assert len(history) == kept
        assert history.numbers().tolist() == list(range(first - kept, first))
        np.testing.assert_array_equal(history.statistic("grad", "norm"), all_norms[-kept:])
        np.testing.assert_array_equal(history.statistic("grad", "norm", last=3), all_norms[-3:])
        assert sum(map(len, history.chunks)) < 20 + 64  # the rest is forgotten


def test_one_chunk_is_handed_out_without_a_copy() -> None:
    history, chunk = History(), made(1, 4, "ab")
    history.append(chunk)
    assert np.shares_memory(history.table("param"), chunk.statistics["param"])
    assert np.shares_memory(history.wall_times(last=2), chunk.wall_times)


def test_columns_follow_the_names() -> None:
    history = History()
    old, new = made(1, 2, "ab"), made(3, 1, "axb")
    history.append(old)
    history.append(new)
    norms = history.statistic("grad", "norm")
    np.testing.assert_array_equal(norms[:2][:, [0, 2]], old.statistic("grad", "norm"))
    assert np.isnan(norms[:2, 1]).all()
    np.testing.assert_array_equal(norms[2:], new.statistic("grad", "norm"))
    assert history.names == ("a", "x", "b")


def test_what_was_not_measured_is_nan() -> None:
    chunk = made(1, 3, "ab", kinds=("grad",))
    chunk.statistics["grad"][1, NUMEL, 0] = 0
    skipped = np.array([False, False, True])
    history = History()
    history.append(Steps(**{**vars(chunk), "skipped": skipped}))
    norms = history.statistic("grad", "norm")
    assert np.isnan(norms).tolist() == [[False, False], [True, False], [True, True]]
    assert np.isnan(history.statistic("update", "norm")).all()
    squares = chunk.statistic("grad", "sum_squares")
    total = history.total_norm("grad")
    np.testing.assert_allclose(total[:2], [squares[0].sum() ** 0.5, squares[1, 1] ** 0.5])
    assert np.isnan(total[2])
    assert history.skipped().tolist() == [False, False, True]


def test_the_loss_is_the_logged_one_then_that_of_the_metrics_then_that_of_the_batches() -> None:
    metrics = np.zeros((4, 53))
    metrics[:, 0], metrics[:, 2] = [2, 2, 0, 0], [3.0, 5.0, 0, 0]
    losses = np.array([[9.0, 9.0], [9.0, 9.0], [1.0, 2.0], [np.nan, np.nan]])
    seen = np.ones((4, 2), np.bool_)
    batches = MicroBatches(losses, seen, losses, np.full((4, 2), -1), [[None, None]] * 4)
    logged = np.array([True, False, False, False])
    chunk = made(1, 4, "a")
    steps = Steps(
        **{
            **vars(chunk),
            "scalars": {"train/loss": np.array([0.5, 77.0, 77.0, 77.0])},
            "logged": {"train/loss": logged},
            "metrics": metrics,
            "micro_batches": batches,
        }
    )
    np.testing.assert_array_equal(step_losses(steps), [0.5, 2.5, 1.5, np.nan])
    history = History()
    history.append(steps)
    history.append(made(5, 1, "a"))
    np.testing.assert_array_equal(history.loss(), [0.5, 2.5, 1.5, np.nan, np.nan])
    np.testing.assert_array_equal(history.scalar("train/loss"), [0.5, *[np.nan] * 4])
    assert history.metrics().shape == (5, 53)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"expected limit of at least 1, got {limit}"):
        History(limit)


def test_an_empty_history_says_so() -> None:
    history = History()
    history.append(made(1, 0, "a"))
    assert len(history) == 0
    with pytest.raises(ValueError, match="expected at least one step, got none"):
        history.numbers()
