"""The example with data and rewards of one's own, and what a first attempt at one's own gets wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyppo.cli.main import main
from asyppo.run.directory import read_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that run the example on two steps of smaller models."""
    monkeypatch.chdir(ROOT)
    return [
        *(
            "train",
            "--config",
            "examples/own_data_and_reward/config.yaml",
            "--max_steps",
            "2",
            "--prompts_per_step",
            "2",
        ),
        *("--warm_start.steps", "2", "--warm_start.batch_size", "4", "--warm_start.policy.hidden_size", "16"),
        *("--data.train_size", "100", "--data.eval_size", "4", "--warm_start.cache_dir", f"{tmp_path}/cache"),
        *("--output_dir", f"{tmp_path}/runs", "--run_name", "run"),
    ]


def test_it_trains(example: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(example) == 0
    assert "Traceback" not in capsys.readouterr().err
    rows = [row for row in read_jsonl(tmp_path / "runs/run/metrics.jsonl") if row["step"]]
    assert len(rows) == 2
    for row in rows:
        expected = row["rewards/close_answer/mean"] + 0.1 * row["rewards/short_working/mean"]
        assert row["critic/score/mean"] == pytest.approx(expected, abs=1e-6)
        assert row["rewards/close_answer/timeouts"] == row["rewards/short_working/timeouts"] == 0
    assert all(row["rewards/short_working/mean"] < 0 for row in rows)  # untaught, it talks to the end
    prompts = {row["prompt"] for row in read_jsonl(ROOT / "examples/own_data_and_reward/prompts.jsonl")}
    assert {sample["prompt"] for sample in read_jsonl(tmp_path / "runs/run/samples.jsonl")} <= prompts


GOOD = [json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) for i in range(20)]
REWARDS = """
def short(completions, **_):
    return [0.0]

def broken(completions, **_):
    return [1.0 / 0 for c in completions]

def needs_level(completions, level, **_):
    return [0.0 for c in completions]
"""


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([], [], "data: own.jsonl has no rows with a prompt, needs at least one"),
        (
            [*GOOD[:6], '{"prompt": "7 + 1 =" "answer": 8}'],
            [],
            "data.bad_rows: own.jsonl has 1 bad row: row 7: no JSON: Expecting ',' delimiter at column 22; needs other",
        ),
        (
            [*GOOD, json.dumps({"prompt": "9 + " * 300, "answer": 9})],
            [],
            "data.long_prompts: own.jsonl has 1 prompt that is too long: row 21: ",
        ),
        (
            GOOD,
            ["--data.dataset_name", "missing.jsonl"],
            "data.dataset_name: got 'missing.jsonl', but there is no such",
        ),
        (GOOD, ["--data.dataset_test_split", "test"], "data.dataset_test_split: got 'test', but "),
        (GOOD, ["--data.eval_size", "20"], "data.eval_size: got 20, but all 20 different prompts of own.jsonl are"),
        (GOOD, ["--reward_funcs", "[nowhere:f]"], "reward_funcs: got 'nowhere:f', but there is no module 'nowhere'"),
        (
            GOOD,
            ["--reward_funcs", "[{tmp}/no.py:f]"],
            "reward_funcs: got '{tmp}/no.py:f', but there is no file {tmp}/no.py",
        ),
        (GOOD, ["--reward_funcs", "[{tmp}/own.py:f]"], "has no function 'f'; it has short, broken, needs_level"),
        (
            GOOD,
            ["--reward_funcs", "[exact_match]"],
            "reward_weights: got [1.0, 0.1], needs 1, one for each of the reward",
        ),
        (
            GOOD,
            ["--reward_funcs", "[{tmp}/own.py:needs_level]", "--reward_weights", "null"],
            "reward_funcs: needs_level needs a column 'level', but the data has task, answer",
        ),
        (GOOD, ["--reward_timeout", "0"], "reward_timeout: got 0.0, needs a positive number of seconds"),
    ],
)
def test_what_cannot_work_is_one_line(
    example: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    lines: list[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "own.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "own.py").write_text(REWARDS)
    own = ["--data.dataset_name", f"{tmp_path}/own.jsonl", *(a.format(tmp=tmp_path) for a in arguments)]
    assert main([*example, *own]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("teach the ")]
    assert len(err) == 1, err
    assert err[0].startswith("asyppo: error: ")
    assert message.format(tmp=tmp_path) in err[0]
    assert not (tmp_path / "runs").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        ("short", "null", r"reward function short, evaluation: returned 1 rewards, needs 8, one for each sample"),
        ("broken", "null", "reward function broken, evaluation, sample 0 ("),
        ("broken", "20", "raised ZeroDivisionError: float division by zero ({tmp}/own.py:6)"),
    ],
)
def test_a_reward_function_that_fails_is_one_line(
    example: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, function: str, timeout: str, message: str
) -> None:
    (tmp_path / "own.py").write_text(REWARDS)
    own = ["--reward_funcs", f"[{tmp_path}/own.py:{function}]", "--reward_weights", "null", "--reward_timeout", timeout]
    assert main([*example, *own]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("asyppo: ")]
    assert len(err) == 1, err
    assert message.format(tmp=tmp_path) in err[0]
