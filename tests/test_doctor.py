"""`pyvizllm doctor`: what it says of a run's history, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyvizllm.cli import main
from pyvizllm.doctor import examine
from pyvizllm.report import render
from pyvizllm.telemetry.diagnosis import RULES


def line(step: int, loss: Any = 1.0, **more: Any) -> dict[str, Any]:
    scalars = {"train/loss": loss, **more.pop("scalars", {})}
    return {"step": step, "wall_time": 100.0 + step, "scalars": scalars, **more}


def write(folder: Path, *lines: Any) -> Path:
    text = [entry if isinstance(entry, str) else json.dumps(entry) for entry in lines]
    (folder / "history.jsonl").write_text("\n".join(text) + "\n")
    return folder


def finding(rule: str, severity: str, step: int, **evidence: Any) -> dict[str, Any]:
    return {
        "rule": rule,
        "severity": severity,
        "step": step,
        "message": f"{rule} of {step}",
        "advice": "Do something.",
        "evidence": evidence,
    }


@pytest.fixture
def ill(tmp_path: Path) -> Path:
    """A run with three findings, one of which went away."""
    return write(
        tmp_path,
        line(10, 3.0, findings=[finding("plateau", "info", 9)]),
        line(20, 2.5, findings=[finding("dead_units", "warning", 20, share=0.95)]),
        line(30, 2.0, scalars={"eval/loss": 1.8, "train/tokens_per_second": 1000.0}),
        line(
            40,
            "NaN",
            scalars={"eval/loss": 1.9, "train/tokens_per_second": 3000.0},
            findings=[
                finding("dead_units", "info", 40, resolved="warning of step 20"),
                finding("non_finite", "serious", 37, flat_index=5, value="Infinity"),
            ],
        ),
    )


def test_the_worst_comes_first_and_what_went_away_says_so(
    ill: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(ill)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"{ill}: steps 10 to 40 in 30 s, train loss nan (at first 3), eval loss 1.9 (best 1.8 at "
        "step 30), 2,000 tokens/s"
    )
    assert out[1:] == [
        "",
        "serious:",
        "  non_finite (step 37)",
        "    non_finite of 37.",
        "    Do something.",
        "",
        "warning:",
        "  dead_units (step 20, gone by step 40)",
        "    dead_units of 20.",
        "    Do something.",
        "",
        "info:",
        "  plateau (step 9)",
        "    plateau of 9.",
        "    Do something.",
    ]


def test_what_is_said_again_and_again_is_one_fault(tmp_path: Path) -> None:
    said = [
        finding("plateau", "info", 9),
        *(finding("overfitting", "warning", step, tag="eval/loss") for step in (20, 30, 40)),
        finding("overfitting", "warning", 45, tag="eval/other/loss"),
        finding("plateau", "info", 50),
        finding("overfitting", "info", 60, resolved="warning of step 45"),
    ]
    run = write(tmp_path, *(line(one["step"], findings=[one]) for one in said))
    assert examine(run).as_text().splitlines()[2:] == [
        "warning:",
        "  overfitting (step 20, 2 times more until step 40, gone by step 60)",
        "    overfitting of 20.",
        "    Step 40: overfitting of 40.",
        "    Do something.",
        "  overfitting (step 45, gone by step 60)",
        "    overfitting of 45.",
        "    Do something.",
        "",
        "info:",
        "  plateau (step 9, once more until step 50)",
        "    plateau of 9.",
        "    Step 50: plateau of 50.",
        "    Do something.",
    ]
    assert len(json.loads(examine(run).as_json())["findings"]) == 6  # machines get all of them
    page = render(run)
    assert re.findall("<small>(.*?)</small>", page) == [
        "<b>warning</b>, overfitting, step 20, 2 times more until step 40, gone by step 60",
        "<b>warning</b>, overfitting, step 45, gone by step 60",
        "<b>info</b>, plateau, step 9, once more until step 50",
    ]
    assert "<p>Step 40: overfitting of 40.</p><p>Do something.</p>" in page


@pytest.mark.parametrize(
    ("steps_and_seconds", "told"),
    [
        # Steps 1 to 50 were before the first publication, and took nobody knows how long.
        ([(50, 0.0), (250, 0.359)], "steps 50 to 250 in 0.36 s"),
        ([(0, 0.0), (50, 4.0), (250, 12.3)], "250 steps in 12 s"),
        ([(0, 0.0), (9000, 5000.0)], "9000 steps in 5,000 s"),
        ([(1000, 0.0), (1001, 0.0)], "steps 1000 to 1001 in 0 s"),
        ([(50, 0.0)], "50 steps"),
    ],
)
def test_the_time_is_that_of_the_steps_it_is_said_of(
    tmp_path: Path, steps_and_seconds: list[tuple[int, float]], told: str
) -> None:
    lines = [line(step) | {"wall_time": 1e9 + seconds} for step, seconds in steps_and_seconds]
    first, *_ = examine(write(tmp_path, *lines)).as_text().splitlines()
    assert first == f"{tmp_path}: {told}, train loss 1 (at first 1)"


def test_the_same_for_machines(ill: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(ill / "history.jsonl"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["serious"] is True
    assert report["summary"]["loss"] == "NaN"
    assert report["summary"]["steps"] == 40
    assert [(f["rule"], f["step"], f["gone"]) for f in report["findings"]] == [
        ("plateau", 9, None),
        ("dead_units", 20, 40),
        ("non_finite", 37, None),
    ]
    assert report["findings"][2]["evidence"] == {"flat_index": 5, "value": "Infinity"}
    assert report["afterwards"] is False


def test_a_healthy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, *(line(step, 5.0 / step) for step in range(1, 100)))
    assert main(["doctor", str(run)]) == 0
    assert "Nothing is wrong, as far as the rules see." in capsys.readouterr().out


def test_a_history_without_findings_is_looked_at_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    losses = np.concatenate((np.linspace(3, 1, 120), np.full(64, 2.9)))
    run = write(tmp_path, *(line(10 * i, loss) for i, loss in enumerate(losses.tolist(), 1)))
    assert main(["doctor", str(run)]) == 1
    out = capsys.readouterr().out
    assert "divergence" in out
    assert "loss_spike (step 1210" in out
    assert "this is from its published scalars alone" in out
    assert not caplog.records  # what is printed is not logged as well


def test_nans_that_only_the_counts_show(tmp_path: Path) -> None:
    quiet = {"health/nans": 0.0, "health/infs": 0.0}
    run = write(
        tmp_path,
        *(line(step, scalars=quiet) for step in (1, 2, 3)),
        line(4, scalars={**quiet, "health/nans": 7.0}),
    )
    (complaint,) = examine(run).complaints
    assert complaint.finding.message == "7 NaNs in the gradients by step 4"
    assert examine(run).serious


def test_overfitting_from_the_scalars_alone(tmp_path: Path) -> None:
    lines = []
    for step in range(1, 401):
        scalars = {} if step % 50 else {"eval/loss": 1.0 + abs(step - 100) / 300}
        lines.append(line(step, 2.0 / step**0.5, scalars=scalars))
    (complaint,) = examine(write(tmp_path, *lines)).complaints
    assert (complaint.finding.rule, complaint.finding.step) == ("overfitting", 300)


def test_torn_lines_are_left_out_and_repeated_steps_replaced(tmp_path: Path) -> None:
    lost = finding("loss_spike", "serious", 30)
    run = write(
        tmp_path,
        line(10),
        line(20, 2.0),
        line(30, 3.0, findings=[lost]),
        '{"step": 40, "wall_ti',
        line(20, 2.5),  # resumed from step 10
        line(20, 2.5, scalars={"eval/loss": 1.0}),  # an evaluation at the same step
    )
    examination = examine(run)
    assert examination.complaints == []
    assert examination.summary == {
        "steps": 20.0,
        "first_step": 10.0,
        "seconds": 10.0,
        "first_loss": 1.0,
        "loss": 2.5,
        "eval_loss": 1.0,
        "best_eval_loss": 1.0,
        "best_eval_step": 20.0,
    }


@pytest.mark.parametrize("content", [None, "", "hello\n", "{}\n"])
def test_what_is_no_history_is_refused(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "history.jsonl").write_text(content)
    assert main(["doctor", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert ": expected " in err
    assert str(tmp_path) in err


def test_the_rules_can_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    assert list(told) == [*(rule.name for rule in RULES), "overfitting"]
    assert told["divergence"] == (
        "The loss stays far above its best level: half of what was learnt is lost again."
    )
    assert all(sentence.endswith(".") for sentence in told.values())  # none goes on below
    assert main(["doctor"]) == 2
    assert "expected the folder of a run with history.jsonl, got ." in capsys.readouterr().err
