"""The example with a policy loss, an advantage and a sampler of one's own, and what a first attempt gets wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyppo.cli.main import main
from asyppo.run.directory import read_jsonl

ROOT = Path(__file__).parents[2]
CONFIG = "examples/own_parts/config.yaml"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that run the example on two steps of smaller models."""
    monkeypatch.chdir(ROOT)
    return [
        *("train", "--config", CONFIG, "--max_steps", "2", "--prompts_per_step", "2", "--num_mini_batches", "2"),
        *("--warm_start.steps", "2", "--warm_start.batch_size", "4", "--warm_start.policy.hidden_size", "16"),
        *("--data.train_size", "100", "--data.eval_size", "4", "--warm_start.cache_dir", f"{tmp_path}/cache"),
        *("--output_dir", f"{tmp_path}/runs", "--run_name", "run", "--learning_rate", "0.01"),
    ]


def test_it_trains(example: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(example) == 0
    assert "Traceback" not in capsys.readouterr().err
    rows = [row for row in read_jsonl(tmp_path / "runs/run/metrics.jsonl") if row["step"]]
    assert len(rows) == 2
    for row in rows:
        assert row["actor/pg_clipfrac"] == 0
        # The sampler's own copy was sent the weights: what it says of its tokens is what the policy says.
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert rows[1]["actor/grad_norm"] > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--policy_loss=gpso", "policy_loss: got 'gpso', needs one of ppo, cispo, gspo, or one of your own"),
        ("--algorithm=gpro", "algorithm: got 'gpro', needs one of asyppo, ppo, grpo, rloo, reinforce++, vineppo, or"),
        ("--sampler=vlm", "sampler: got 'vlm', needs one of auto, generate, continuous, vllm, or one of your own"),
        ("--sampler=examples/own_parts/parts.py:Sampler", "has no function 'Sampler'; it has "),
        (
            "--sampler=examples/own_parts/parts.py:vanilla",
            "parts.py:vanilla takes (tokens), needs to be called with (policy, tokenizer, ",
        ),
        ("--policy_loss=examples/nothing.py:f", "policy_loss: got 'examples/nothing.py:f', but there is no file"),
        (
            "--algorithm=examples/own_parts/parts.py:vanilla",
            "parts.py:vanilla takes (tokens), needs to be called with (outcome, options)",
        ),
    ],
)
def test_what_cannot_work_is_one_line(
    example: list[str], option: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([*example, option]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert message in error.splitlines()[-1]
