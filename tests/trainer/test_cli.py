"""The command line: help, errors in one line, and a whole tiny run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyppo.cli import main, parse
from asyppo.run import read_jsonl

TINY = """
algorithm: asyppo
max_steps: 2
output_dir: {tmp}/runs
prompts_per_step: 2
num_generations: 4
max_completion_length: 6
num_mini_batches: 2
learning_rate: 1.0e-3
data:
  task: {{name: chain_sum, params: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}}}
  train_size: 20
  eval_size: 4
warm_start:
  steps: 2
  batch_size: 4
  policy: &shape {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
    intermediate_size: 32}}
  critic: *shape
  cache_dir: {tmp}/cache
eval: {{num_generations: 2}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments of a tiny run."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(tmp=tmp_path))
    return ["train", "--config", str(file)]


def metrics(path: Path) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("timing_s/", "perf/"))}
        for row in read_jsonl(path / "metrics.jsonl")
    ]


def test_a_whole_run_and_a_second_one(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--run_name", "one"]) == 0
    out, err = capsys.readouterr()
    assert "teach the policy 2/2" in err
    assert "Traceback" not in err
    lines = out.splitlines()
    accuracy = re.fullmatch(r"held-out accuracy: (\d\.\d{4}) -> (\d\.\d{4})", lines[0])
    assert accuracy
    rows = metrics(tmp_path / "runs" / "one")
    assert [f"{rows[i]['eval/accuracy']:.4f}" for i in (0, -1)] == list(accuracy.groups())
    paths = [Path(line.split(maxsplit=1)[1]) for line in lines[1:]]
    assert [path.name for path in paths] == ["one", "metrics.jsonl", "curves.png", "samples.jsonl", "checkpoint-2"]
    assert all(path.exists() for path in paths)
    AutoModelForCausalLM.from_pretrained(paths[-1] / "policy")

    # The second run finds the models in the cache, and does the same, bit for bit.
    assert main([*tiny, "--run_name", "two"]) == 0
    assert "teach" not in capsys.readouterr().err
    assert metrics(tmp_path / "runs" / "two") == rows

    # Its checkpoint is a model like any other.
    again = ["--warm_start", "null", "--policy.model_name_or_path", str(paths[-1] / "policy")]
    again += ["--critic.model_name_or_path", str(paths[-1] / "critic_0"), "--run_name", "three"]
    assert main([*tiny, *again]) == 0
    assert metrics(tmp_path / "runs" / "three")[0]["eval/accuracy"] == rows[-1]["eval/accuracy"]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_baselines(tiny: list[str], tmp_path: Path, algorithm: str) -> None:
    assert main([*tiny, "--algorithm", algorithm, "--run_name", "one", "--data.eval_size", "0"]) == 0
    assert len(metrics(tmp_path / "runs" / "one")) == 2


def test_going_on(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [*tiny, "--run_name", "one", "--resume"]
    assert main(command) == 0  # there is no such run yet
    first = capsys.readouterr().out
    rows = metrics(tmp_path / "runs" / "one")
    assert main(command) == 0  # it is at its end
    assert capsys.readouterr().out == first
    assert metrics(tmp_path / "runs" / "one") == rows
    assert main([*command, "--max_steps", "3"]) == 0
    assert metrics(tmp_path / "runs" / "one")[:3] == rows
    assert len(metrics(tmp_path / "runs" / "one")) == 4
    capsys.readouterr()
    assert main([*command, "--seed", "1", "--beta", "0.1"]) == 2
    err = capsys.readouterr().err
    assert "config.yaml: seed is 0 there, got 1, beta is 0.0 there, got 0.1; --resume may change max_steps, " in err
    assert len(err.splitlines()) == 1
    for file in (tmp_path / "runs" / "one").glob("checkpoint-*/rng.json"):
        file.unlink()
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("asyppo: error: no checkpoint in ")
    assert "Traceback" not in err


def test_falling_short_is_an_error(tiny: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--eval.min_gain", "0.9"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("held-out accuracy: ")
    assert re.search(r"error: held-out accuracy rose by -?\d\.\d{4}, less than eval\.min_gain = 0\.9$", err.strip())


def test_a_failed_run(tiny: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyppo.trainer._clip_and_step", lambda *_: None)
    assert main([*tiny, "--max_skipped_steps", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("asyppo: error: 1 steps in a row had a non-finite loss or gradient")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nope", "1"], "--nope"),
        (["--critic.nope", "1"], "--critic.nope"),
        (["--max_steps", "many"], "max_steps"),
        (["--critic.num_critics", "2.5"], "critic.num_critics"),
        (["--algorithm", "reinforce"], "algorithm"),
        (["--advantage_mask_fraction", "1.0"], "advantage_mask_fraction: got 1.0, needs a fraction in [0, 1)"),
        (["--entropy_filter_fraction", "-0.1"], "entropy_filter_fraction"),
        (["--num_generations", "1"], "num_generations: got 1, needs at least critic.num_critics = 2"),
        (["--num_generations", "1", "--algorithm", "grpo"], "num_generations: got 1, needs at least 2"),
        (["--learning_rate", "0"], "learning_rate: got 0.0, needs a positive number"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--eval.num_generations", "0"], "eval.num_generations"),
        (["--eval.every", "-1"], "eval.every"),
        (["--data.eval_size", "0", "--eval.min_gain", "0.1"], "data.eval_size"),
        (["--data.train_size", "2000"], "data.task"),
        (["--data.task.name", "nope"], "data.task: got 'nope'"),
        (["--reward_funcs", "[nope]"], "reward_funcs: got 'nope'"),
        (["--config", "/no/such.yaml"], "config"),
        (["--warm_start", "null"], "policy.model_name_or_path"),
        (["--policy.model_name_or_path", "/x"], "policy.model_name_or_path"),
        (["--critic.model_name_or_path", "/x"], "critic.model_name_or_path"),
        (["--warm_start", "null", "--policy.model_name_or_path", "/no/such/model"], "model_name_or_path"),
        (["--run_name", "taken"], "taken exists, needs a new name, or --resume to go on with that run"),
        (["--resume"], "run_name: got None, needs the name of the run that --resume goes on with"),
        (["--run_name", "taken", "--resume"], "taken has no config.yaml, needs the directory of a run"),
        (["--save_total_limit", "0"], "save_total_limit: got 0, needs an integer of at least 1"),
        (["--report_to", "[visdom]"], "report_to"),
    ],
)
def test_a_setting_that_cannot_work(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], named: str
) -> None:
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "notes").write_text("")
    assert main([*tiny, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("asyppo: error: ")
    assert named in err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]  # nothing was begun


def test_a_file_with_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bad.yaml").write_text("critic: {num_critic: 3}\n")
    assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    err = capsys.readouterr().err
    assert "critic.num_critic" in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tiny: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("asyppo: error: device: got 'cuda', but torch finds no GPU")


def test_a_model_without_a_tokenizer(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, tiny_lm: Callable[..., Any]
) -> None:
    tiny_lm().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert main([*tiny, "--warm_start", "null", "--policy.model_name_or_path", str(tmp_path / "model")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err.splitlines()[-1]


def test_help_explains_every_field(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--critic.num_critics",
        "M. The paper's sweet spot is 2.",
        "--epsilon_high",
        "clip-higher",
        "default: 0.28",
        "--advantage_mask_fraction",
        "those where critics agree most, whose advantage is masked",
        "--eval.min_gain",
        "--warm_start",
    ):
        assert part in text, part


def test_without_a_file_the_embedded_default_runs() -> None:
    config = parse(["train", "--seed", "7"])
    assert config.seed == 7
    assert config.algorithm == "asyppo"
    assert config.warm_start is not None
    assert config.eval.min_gain is not None
    assert config.eval.min_gain >= 0.2
    assert (config.data.eval_size, config.eval.num_generations, config.eval.temperature) == (512, 4, 1.0)
    assert parse(["train", "--config", str(Path(__file__).parents[2] / "asyppo" / "default.yaml")]).seed == 0
