"""``asyppo compare``: the grid, the statistics, and a real grid that is stopped and gone on with."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from asyppo.algorithm.student import quantile
from asyppo.compare.command import write
from asyppo.compare.figure import draw, draw_diagnostics
from asyppo.compare.grid import Grid, Run, load_grid
from asyppo.compare.runner import check_runs, finished, last_step
from asyppo.compare.summary import estimate, markdown, paired_difference, summarize
from asyppo.config import ConfigError, load_config
from asyppo.run.directory import RunDirectory

TINY = {
    "max_steps": 2,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "data": {"task": {"name": "chain_sum"}, "train_size": 50, "eval_size": 8},
    "warm_start": {
        "policy": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
        "critic": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
        "steps": 2,
        "batch_size": 4,
    },
}


def grid_file(directory: Path, **changes: Any) -> Path:
    """Write a grid of two arms and two seeds."""
    (directory / "base.yaml").write_text(yaml.safe_dump(TINY))
    content = {"config": "base.yaml", "seeds": [0, 1], "arms": {"grpo": {"algorithm": "grpo"}, "mini critics": None}}
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def test_a_grid_is_every_arm_with_every_seed(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path, set={"critic": {"num_critics": 4}}))
    assert [run.name for run in grid.runs] == ["grpo-0", "mini-critics-0", "grpo-1", "mini-critics-1"]
    assert grid.reference == "grpo"
    assert grid.arms["grpo"]["algorithm"] == "grpo"
    assert grid.arms["mini critics"]["critic"] == {"num_critics": 4}
    assert grid.arms["mini critics"]["max_steps"] == grid.steps("mini critics") == 2
    (tmp_path / "base.yaml").write_text("seed: 3")
    assert load_grid(tmp_path / "grid.yaml").steps("grpo") == 100  # the setting's default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "got the key 'arm', needs arms, config, reference, seeds, set"),
        ({"seeds": []}, r"seeds: got \[\], needs a list of integers"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\], needs different ones"),
        ({"arms": {}}, "arms: got {}, needs a mapping from names to settings"),
        ({"arms": {"a b": {}, "a-b": {}}}, "arms: got a b, a-b, needs names that differ"),
        ({"reference": "ppo"}, "reference: got 'ppo', needs one of the arms: grpo, mini critics"),
        ({"config": "none.yaml"}, "config: cannot read '.*/none.yaml': No such file or directory; needs a YAML file"),
        ({"arms": {"a": {"algorithm": "grpo", "num_generations": 1}}}, "arms: a: num_generations: got 1"),
        ({"arms": {"a": {"algorithn": "grpo"}}}, r"arms: a: algorithn: unknown key; did you mean algorithm\?"),
        ({"arms": {"a": {"critic": {"lora_rank": 4}}}}, r"arms: a: critic\.lora_rank: .* is critic\.lora_r now"),
        ({"set": {"max_steps": "many"}}, "arms: grpo: max_steps: got 'many', needs an integer of at least 1"),
    ],
)
def test_a_grid_that_cannot_run_is_refused_before_it_runs(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_grid(grid_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("p", "degrees", "expected"),  # of tables of Student's t
    [(0.975, 1, 12.706204736174707), (0.975, 4, 2.776445105197814), (0.8, 2, 1.0606601717798212), (0.5, 3, 0.0),
     (0.025, 5, -2.5705818356363155), (0.999, 30, 3.3851848668293045)],
)  # fmt: skip
def test_quantiles_are_students(p: float, degrees: int, expected: float) -> None:
    assert quantile(p, degrees) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    with pytest.raises(ValueError, match="degrees: got 0"):
        quantile(p, 0)


def test_the_interval_is_students() -> None:
    # Mean 2, deviation 1, n = 3: t_(0.975, 2) = 4.302653.
    result = estimate([1.0, 2.0, 3.0])
    assert result.mean == 2.0
    assert result.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(estimate([1.0]).half_width)


def test_differences_are_paired_by_seed() -> None:
    # Seeds differ by 0.3, arms by 0.1 ± 0.01: unpaired, nothing would be seen.
    arm, reference = {0: 0.31, 1: 0.60, 2: 0.89, 7: 0.0}, {0: 0.20, 1: 0.50, 2: 0.80}
    difference = paired_difference(arm, reference)
    assert difference is not None
    assert difference.seeds == 3
    assert difference.estimate.mean == pytest.approx(0.1)
    assert difference.estimate.half_width == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-4)
    # t_(0.975, 2) + t_(0.8, 2) = 4.302653 + 1.060660.
    assert difference.detectable == pytest.approx(5.363313 * 0.01 / math.sqrt(3), rel=1e-4)
    assert paired_difference(arm, {9: 0.5}) is None


def fake_run(out: Path, run: Run, accuracy: list[float], steps: int = 2) -> None:
    """Write what a finished run leaves that the summary reads."""
    directory = out / "runs" / run.name
    (directory / f"checkpoint-{steps}").mkdir(parents=True)
    rows = [{"step": 0, "eval/accuracy": accuracy[0]}] if len(accuracy) > 1 else []
    rows += [
        {
            "step": s,
            "timing_s/step": 2.5,
            "timing_s/diagnostics": 0.5,
            "critic/vf_explained_var": 0.1 * s,
            "critic/0/vf_explained_var": 0.4,
        }
        for s in range(1, steps + 1)
    ]
    rows[-1]["eval/accuracy"] = accuracy[-1]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_summary_is_that_of_finished_runs(tmp_path: Path) -> None:
    grid = Grid({"grpo": {"max_steps": 2}, "ours": {"max_steps": 2}}, [0, 1, 2], "grpo")
    for seed, accuracy in enumerate((0.4, 0.5)):
        fake_run(tmp_path, Run("grpo", seed), [0.3, accuracy])
        fake_run(tmp_path, Run("ours", seed), [0.3, accuracy + 0.1])
    grpo, ours = summarize(grid, tmp_path)
    assert [curve.seed for curve in ours.curves] == [0, 1]
    assert ours.curves[0].steps == [0, 2]
    assert ours.curves[0].seconds == [0.0, 4.0]
    assert ours.final is not None
    assert ours.final.mean == pytest.approx(0.55)
    assert ours.gain is not None
    assert ours.gain.mean == pytest.approx(0.25)
    assert ours.difference is not None
    assert ours.difference.estimate.mean == pytest.approx(0.1)
    assert grpo.difference is None
    fake_run(tmp_path, Run("ours", 2), [0.9])  # not evaluated before its first step
    assert summarize(grid, tmp_path)[1].gain == ours.gain
    assert ours.seconds_per_step == 2.0
    # Of the last half of the steps: step 2 alone.
    assert ours.diagnostics["explained variance of V̄"] == pytest.approx(0.2)
    assert ours.diagnostics["of each critic"] == pytest.approx(0.4)
    assert ours.diagnostics["σ"] is None
    assert ours.over_training["explained variance of V̄"] == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))]
    assert ours.over_training["σ"] == []
    table = markdown([grpo, ours], "grpo")
    for part in table.split("\n\n"):
        assert len({line.count("|") for line in part.strip().splitlines()}) == 1
    assert "| ours | 2 | 0.550 ± " in table
    assert "+0.100" in table
    draw([grpo, ours], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    draw_diagnostics([grpo, ours], tmp_path / "diagnostics.png")
    assert (tmp_path / "diagnostics.png").stat().st_size > 5_000


def test_an_unfinished_run_is_not_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid({"grpo": {"max_steps": 3}}, [0], "grpo")
    fake_run(tmp_path, Run("grpo", 0), [0.3, 0.4], steps=2)
    assert last_step(tmp_path, Run("grpo", 0)) == 2
    assert not finished(tmp_path, Run("grpo", 0), grid)
    write(grid, tmp_path, "grid")
    assert "| grpo | 0 | – |" in capsys.readouterr().out


def compare(tmp_path: Path, *arguments: str, **options: Any) -> subprocess.Popen:
    """Start ``asyppo compare`` as a user would."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "asyppo",
            "compare",
            str(tmp_path / "grid.yaml"),
            "--out",
            str(tmp_path / "out"),
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_a_run_of_more_steps_counts_up_to_the_grids_last(tmp_path: Path) -> None:
    fake_run(tmp_path, Run("grpo", 0), [0.3, 0.4], steps=2)
    fake_run(tmp_path, Run("grpo", 1), [0.3, 0.5], steps=4)
    (tmp_path / "runs" / "grpo-1" / "checkpoint-2").mkdir()
    [arm] = summarize(Grid({"grpo": {"max_steps": 2}}, [0, 1], "grpo"), tmp_path)
    assert [curve.steps for curve in arm.curves] == [[0, 2], [0]]  # the other evaluation was after step 4


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    path = grid_file(tmp_path)
    grid = load_grid(path)
    check_runs(grid, tmp_path / "out")
    config = load_config(grid.arms["grpo"])
    config = replace(config, seed=1, run_name="grpo-1", output_dir=str(tmp_path / "out" / "runs"))
    with RunDirectory(config):
        pass
    check_runs(grid, tmp_path / "out")
    check_runs(load_grid(grid_file(tmp_path, set={"max_steps": 9})), tmp_path / "out")
    changed = load_grid(grid_file(tmp_path, set={"learning_rate": 0.5}))
    with pytest.raises(ConfigError, match=r"arms: grpo: resume: other settings .*learning_rate is .* there, got 0.5"):
        check_runs(changed, tmp_path / "out")


@pytest.mark.slow
def test_a_grid_is_stopped_and_gone_on_with(tmp_path: Path) -> None:
    grid_file(tmp_path, set={"max_steps": 3, "save_steps": 1})
    first = compare(tmp_path, "--jobs", "2")
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out").glob("runs/*/checkpoint-1")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=240)
    assert first.returncode == 130, errors
    assert "runs are not finished; the same command goes on" in errors

    second = compare(tmp_path)
    output, errors = second.communicate(timeout=500)
    assert second.returncode == 0, errors
    assert "| grpo | 2 |" in output
    assert "| mini critics | 2 |" in output
    assert (tmp_path / "out" / "grid.png").exists()
    for run in load_grid(tmp_path / "grid.yaml").runs:
        rows = (tmp_path / "out" / "runs" / run.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    grid_file(
        tmp_path,
        seeds=[0],
        arms={"bad": {"policy": {"model_name_or_path": "/nowhere"}, "warm_start": None}, "good": {}},
    )
    process = compare(tmp_path)
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 1
    assert "run bad-0 failed" in errors
    assert "/nowhere" in errors
    assert "| good | 1 |" in output
