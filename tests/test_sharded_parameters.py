"""`watch` of sharded parameters in four gloo processes, against float64 of the whole tensors.

The processes are started once (torch takes seconds to start), do all trainings of sharded_ranks.py
and leave what came of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sharded_ranks import EVERY, STEPS
from torch import Tensor

import pyvizllm
from pyvizllm.telemetry.parts import merged
from pyvizllm.telemetry.records import STATISTICS

RANKS = Path(__file__).with_name("sharded_ranks.py")
SIZE = 4
INTERVALS = ((1, 2), (3, 4), (5,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each process got."""
    paths = [str(RANKS.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(RANKS), str(SIZE), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(SIZE)]


def published(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The publications of steps: after them comes that of the end."""
    shown = [p for p in run["publications"] if "train/learning_rate" in p["scalars"]]
    assert [p["step"] for p in shown] == [interval[-1] for interval in INTERVALS]
    return shown


def norms(tensors: list[Tensor]) -> np.ndarray:
    return np.array([float(t.double().norm()) for t in tensors])


@pytest.mark.parametrize("name", ["whole", "replicas", "mixed", "budget"])
def test_the_first_rank_shows_the_whole_tensors_numbers(
    ranks: list[dict[str, Any]], name: str
) -> None:
    """Uneven and empty parts; a mesh with replicas; beside a layer that is not sharded."""
    run = ranks[0][name]
    parameters = list(run["steps"][0]["grad"])
    assert len(parameters) == 6
    for interval, publication in zip(INTERVALS, published(run), strict=True):
        scalars, histograms = publication["scalars"], publication["histograms"]
        steps = [run["steps"][step - 1] for step in interval]
        total = np.zeros(len(steps))
        elements = zeros = 0
        for parameter in parameters:
            gradients = [step["grad"][parameter] for step in steps]
            each = norms(gradients)
            total += each**2
            elements += sum(g.numel() for g in gradients)
            zeros += sum(int((g == 0).sum()) for g in gradients)
            assert scalars[f"grad_norm/{parameter}"] == pytest.approx(each.mean(), rel=1e-6)
            counts, moments = histograms[f"grad/{parameter}"]
            expected = pyvizllm.tensor_stats(gradients).histogram.sum(0)
            np.testing.assert_array_equal(counts, expected.numpy())
            values = torch.cat([g.double().flatten() for g in gradients])
            extremes = float(values.min()), float(values.max())
            sums = float(values.sum()), float(values.square().sum())
            np.testing.assert_allclose(moments, (*extremes, *sums), rtol=1e-5, atol=1e-6)
            if interval[-1] % EVERY:  # the end: parameters were not measured
                continue
            after, before = (steps[-1][when][parameter].double() for when in ("after", "before"))
            assert scalars[f"param_norm/{parameter}"] == pytest.approx(
                float(after.norm()), rel=1e-6
            )
            ratio = float((after - before).norm() / after.norm())
            assert scalars[f"update_ratio/{parameter}"] == pytest.approx(ratio, rel=1e-5)
            counts, _ = histograms[f"param/{parameter}"]
            expected = pyvizllm.tensor_stats([steps[-1]["after"][parameter]]).histogram[0]
            np.testing.assert_array_equal(counts, expected.numpy())
        assert scalars["train/grad_norm"] == pytest.approx(np.sqrt(total).mean(), rel=1e-6)
        assert scalars["train/grad_norm_max"] == pytest.approx(np.sqrt(total).max(), rel=1e-6)
        assert scalars["health/zeros"] == pytest.approx(zeros / elements)


def test_the_trajectory_is_that_of_the_whole_parameters(ranks: list[dict[str, Any]]) -> None:
    """A sketch of 64 numbers for 6 parameters: within a third of the distance, surely."""
    run = ranks[0]["whole"]
    start = run["steps"][0]["before"]
    for interval, publication in list(zip(INTERVALS, published(run), strict=True))[:2]:
        now = run["steps"][interval[-1] - 1]["after"]
        distance = float(np.linalg.norm(norms([now[n].double() - start[n] for n in start])))
        shown = publication["scalars"]["trajectory/distance"]
        assert shown == pytest.approx(distance, rel=0.35)


@pytest.mark.parametrize("name", ["whole", "replicas", "nan"])
def test_other_ranks_leave_sharded_parameters_out(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks[1:]:
        assert rank[name]["messages"] == []
        for publication in published(rank[name]):
            assert publication["histograms"] == {}
            tags = publication["scalars"].keys()
            assert not [t for t in tags if t.startswith(("grad", "param", "traj", "train/grad"))]


def test_other_ranks_show_what_is_not_sharded(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[1:]:
        for publication in published(rank["mixed"]):
            grads = {t for t in publication["scalars"] if t.startswith("grad_norm/")}
            assert grads == {"grad_norm/4.weight", "grad_norm/4.bias"}


def test_clipping_is_torchs_and_measured_before(ranks: list[dict[str, Any]]) -> None:
    """The norm of all of them, 100 times the limit."""
    run = ranks[0]["replicas"]
    for interval, publication in zip(INTERVALS, published(run), strict=True):
        expected = np.mean([float(run["steps"][step - 1]["norm"]) for step in interval])
        assert publication["scalars"]["train/grad_norm"] == pytest.approx(expected, rel=1e-6)
        assert publication["scalars"]["train/clipped"] == 1.0


def test_the_first_nan_is_found_in_the_whole_tensor(ranks: list[dict[str, Any]]) -> None:
    (finding,) = [f for p in ranks[0]["nan"]["publications"] for f in p["findings"]]
    assert "the gradient of 0.weight was the first that was not finite" in finding
    assert "flat index 26 = [4, 2]" in finding  # which the third rank has at [0, 2]
    scalars = published(ranks[0]["nan"])[1]["scalars"]
    assert scalars["health/infs"] == 1
    assert scalars["health/nans"] >= 1


def test_a_step_that_a_scaler_skips_for_another_ranks_part_is_no_fault(
    ranks: list[dict[str, Any]],
) -> None:
    """The third rank's part of one gradient has a NaN: all skip the third step."""
    run = ranks[0]["skipped"]
    skipped = [p["scalars"].get("health/skipped_steps", 0.0) for p in published(run)]
    assert skipped == [0.0, 1.0, 0.0]
    assert [f for p in run["publications"] for f in p["findings"]] == []
    for parameter, before in run["steps"][2]["before"].items():
        torch.testing.assert_close(run["steps"][2]["after"][parameter], before, rtol=0, atol=0)


def test_the_first_nan_is_found_where_parts_are_parts_of_parts(
    ranks: list[dict[str, Any]],
) -> None:
    run = ranks[0]["two ways"]
    assert torch.isnan(run["steps"][2]["grad"]["0.weight"]).nonzero().tolist() == [[3, 2]]
    (finding,) = [f for p in run["publications"] for f in p["findings"]]
    assert "flat index 20 = [3, 2]" in finding
    first = published(run)[0]["scalars"]
    for parameter in run["steps"][0]["grad"]:
        each = norms([step["grad"][parameter] for step in run["steps"][:2]])
        assert first[f"grad_norm/{parameter}"] == pytest.approx(each.mean(), rel=1e-6)


def test_histograms_have_every_step_where_publishers_are_late(ranks: list[dict[str, Any]]) -> None:
    """Each of them is, at another step, and then takes its counts a publication later."""
    run = ranks[0]["late"]
    shown = [p for p in run["publications"] if "train/learning_rate" in p["scalars"]]
    assert [p["step"] for p in shown] == list(range(1, STEPS + 1))
    assert run["messages"] == []
    for parameter in run["steps"][0]["grad"]:
        gradients = [step["grad"][parameter] for step in run["steps"]]
        tables = [p["histograms"].get(f"grad/{parameter}") for p in shown]
        counts, moments = zip(*[table for table in tables if table is not None], strict=True)
        expected = pyvizllm.tensor_stats(gradients).histogram.sum(0)
        np.testing.assert_array_equal(sum(counts), expected.numpy())
        values = torch.stack(gradients).double()
        low, high, total, squares = np.array(moments).T
        np.testing.assert_allclose(low.min(), float(values.min()), rtol=1e-6)
        np.testing.assert_allclose(high.max(), float(values.max()), rtol=1e-6)
        np.testing.assert_allclose(total.sum(), float(values.sum()), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(squares.sum(), float(values.square().sum()), rtol=1e-5)


def test_watches_of_equal_parameters_are_not_mixed_up(ranks: list[dict[str, Any]]) -> None:
    (small,), (large,) = ranks[0]["side by side"]
    assert large == pytest.approx(100 * small, rel=1e-5)


def test_parts_of_the_older_sharding_are_not_shown_as_wholes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (message,) = rank["older"]["messages"]
        assert message.startswith("watch: parameters of FullyShardedDataParallel, of which this")
        assert "are left out: 6 of them, 0.weight the first" in message
        assert "train/learning_rate" in rank["older"]["tags"]
        assert not [t for t in rank["older"]["tags"] if t.startswith(("grad", "train/grad"))]


def test_partial_gradients_are_left_out_in_one_sentence(ranks: list[dict[str, Any]]) -> None:
    run = ranks[0]["tensor parallel"]
    (message,) = [m for m in run["messages"] if m.startswith("watch")]
    assert message.startswith("watch: grad of 0.weight is left out, and so are others like it: of")
    assert "(Partial)" in message
    for interval, publication in list(zip(INTERVALS, published(run), strict=True))[:2]:
        scalars = publication["scalars"]
        shown = {t for t in scalars if t.startswith("grad_norm/")}
        assert shown == {f"grad_norm/{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        for parameter in ("1.weight", "2.weight", "2.bias"):  # rows, columns, and replicated
            each = norms([run["steps"][step - 1]["grad"][parameter] for step in interval])
            assert scalars[f"grad_norm/{parameter}"] == pytest.approx(each.mean(), rel=1e-6)
        for parameter, after in run["steps"][interval[-1] - 1]["after"].items():
            expected = float(after.double().norm())
            assert scalars[f"param_norm/{parameter}"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_intervals_stay_as_asked(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        told = ["watch: max_overhead has no effect where parameters are sharded"]
        assert rank["budget"]["messages"] == told
        for publication in published(rank["budget"]):
            assert publication["scalars"]["pyvizllm/publish_every"] == EVERY


def test_parts_that_do_not_come_are_left_out_and_training_goes_on(
    ranks: list[dict[str, Any]],
) -> None:
    """The second rank publishes at steps 3 and 5: no hand-over is of the same steps."""
    run = ranks[0]["others"]
    (message,) = run["messages"]
    assert message.startswith("watch: 6 sharded parameters are left out of steps 1 to 2: ")
    assert "the processes 0, 1, 2, 3; each has to watch them" in message
    assert len(run["steps"]) == STEPS
    for publication in published(run):
        assert publication["histograms"] == {}
        tags = publication["scalars"].keys()
        assert not [tag for tag in tags if tag.startswith(("grad_norm", "train/grad", "traj"))]


def test_what_is_not_whole_is_refused_in_a_sentence(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["errors"] == {
            "log": "TypeError: Watch.log: expected total to be whole on each process, got a "
            "DTensor of (Partial(sum),); log total.full_tensor(), in all processes",
            "log replicated": "nothing",
            "tensor_stats": "TypeError: tensor_stats: expected tensors that this process has "
            "whole, got a DTensor at position 0: give its to_local() or full_tensor()",
        }


def test_parts_merge_to_the_statistics_of_the_whole() -> None:
    """With a NaN, an Inf, an empty part and one that was not measured."""
    tensors = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    tensors[1][5], tensors[2][1] = float("nan"), -float("inf")

    def statistics(parts: list[Tensor]) -> np.ndarray:
        stats = pyvizllm.tensor_stats(parts)
        return torch.cat([stats.values, stats.counts.double()]).numpy()

    first = statistics([t[:4] for t in tensors[:3]] + [tensors[3][:0]])
    other = statistics([t[4:] for t in tensors[:3]] + [tensors[3]])
    np.testing.assert_allclose(merged(first, other), statistics(tensors), rtol=1e-6)
    nothing = np.zeros((len(STATISTICS), 4))
    np.testing.assert_array_equal(merged(first, nothing)[:, :3], first[:, :3])
