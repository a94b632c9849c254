"""Mistakes of a new user: each gives one line that names the field and the remedy, and exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from asyppo.cli.main import main

CONFIG = """
max_steps: 1
prompts_per_step: 2
num_generations: 4
max_completion_length: 4
num_mini_batches: 1
output_dir: runs
policy: {model_name_or_path: policy}
critic: {model_name_or_path: critic}
data: {dataset_name: rows.jsonl, eval_size: 0}
reward_funcs: ["rewards.py:by_length"]
"""

REWARDS = """
def by_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def too_few(prompts, completions, **columns):
    return [0.0]


def not_finite(prompts, completions, **columns):
    return [float("nan")] * len(prompts)


def raises(prompts, completions, **columns):
    return [1 / 0 for _ in prompts]


def needs_a_column(prompts, completions, *, solution, **columns):
    return [0.0] * len(prompts)
"""


@pytest.fixture
def project(
    tmp_path: Path, tiny_lm: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A directory with all that a run needs, and in it."""
    monkeypatch.chdir(tmp_path)
    for name, model in (("policy", tiny_lm()), ("critic", tiny_lm(num_hidden_layers=1))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "my.yaml").write_text(CONFIG)
    return tmp_path


def rows(directory: Path, **changes: str) -> None:
    """Write ten rows, some of them changed: ``row7`` is the seventh line."""
    lines = [json.dumps({"prompt": "abcd"[: 1 + i % 4] + "efghijklmn"[i], "answer": "a"}) for i in range(10)]
    for name, line in changes.items():
        lines[int(name.removeprefix("row")) - 1] = line
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n")


def test_without_a_mistake_it_runs(project: Path) -> None:
    assert main(["train", "--config", "my.yaml"]) == 0


def missing_file(project: Path) -> None:
    (project / "rows.jsonl").unlink()


def empty_data(project: Path) -> None:
    (project / "rows.jsonl").write_text("")


def broken_json(project: Path) -> None:
    rows(project, row7='{"prompt": "ab"')


def no_prompt(project: Path) -> None:
    rows(project, row7='{"question": "ab"}')


def long_prompt(project: Path) -> None:
    rows(project, row3=json.dumps({"prompt": "a" * 70, "answer": "a"}))


def chat_without_a_template(project: Path) -> None:
    rows(project, row1=json.dumps({"prompt": [{"role": "user", "content": "ab"}], "answer": "a"}))


def other_vocabulary(project: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(project / "critic")
    config.vocab_size = 18
    AutoModelForCausalLM.from_config(config).save_pretrained(project / "critic")


def pickle_weights(project: Path) -> None:
    from safetensors.torch import load_file

    weights = project / "policy" / "model.safetensors"
    torch.save(load_file(weights), project / "policy" / "pytorch_model.bin")
    weights.unlink()


def half_a_file(project: Path) -> None:
    os.truncate(project / "policy" / "model.safetensors", 100)


def a_run_of_that_name(project: Path) -> None:
    (project / "runs" / "mine").mkdir(parents=True)
    (project / "runs" / "mine" / "config.yaml").write_text(CONFIG)


def nothing(project: Path) -> None:
    pass


MISTAKES: list[tuple[Callable[[Path], None], list[str], list[str]]] = [
    (missing_file, [], ["data.dataset_name: got 'rows.jsonl'", "no such file"]),
    (empty_data, [], ["data", "rows.jsonl has no rows", "needs at least one"]),
    (broken_json, [], ["data.bad_rows: rows.jsonl has 1 bad row", "row 7", "JSON", "or 'skip' to leave these out"]),
    (no_prompt, [], ["data.bad_rows: rows.jsonl has 1 bad row", "row 7: no column 'prompt'", "or 'skip'"]),
    (long_prompt, [], ["data.long_prompts: rows.jsonl has 1 ", "row 3: 70 tokens, needs at most 60", "or 'skip'"]),
    (chat_without_a_template, [], ["data: prompts are chat messages", "has no chat template", "needs text prompts"]),
    (
        other_vocabulary,
        [],
        ["critic.model_name_or_path: 'critic' has embeddings of 18 tokens, needs those of the policy's tokenizer, 19"],
    ),
    (pickle_weights, [], ["policy.model_name_or_path: 'policy'", "pickle", "needs safetensors"]),
    (a_run_of_that_name, ["--run_name", "mine"], ["run_name: ", "runs/mine exists", "--resume"]),
    (nothing, ["--output_dir", "rewards.py"], ["output_dir: cannot make rewards.py/", "rewards.py is no directory"]),
    (nothing, ["--config", "yours.yaml"], ["config: cannot read 'yours.yaml'", "needs a YAML file"]),
    (nothing, ["--learning-rate", "1"], ["--learning-rate: unknown option; did you mean --learning_rate?"]),
    (nothing, ["--advantage_mask_fraction", "1"], ["advantage_mask_fraction: got 1.0, needs a fraction in [0, 1)"]),
    (nothing, ["--num_generations", "1"], ["num_generations: got 1, needs at least critic.num_critics = 2"]),
    (nothing, ["--reward_funcs", "[no.such:reward]"], ["reward_funcs: ", "no.such:reward"]),
    (nothing, ["--reward_funcs", "[elsewhere.py:reward]"], ["reward_funcs: ", "elsewhere.py"]),
    (nothing, ["--reward_funcs", "[rewards.py:by_lenght]"], ["reward_funcs: ", "by_lenght"]),
    (nothing, ["--reward_funcs", "[rewards.py:too_few]"], ["reward", "too_few", "returned 1 ", "needs 8"]),
    (nothing, ["--reward_funcs", "[rewards.py:not_finite]"], ["reward", "not_finite", "nan", "needs a finite number"]),
    (nothing, ["--reward_funcs", "[rewards.py:raises]"], ["reward", "raises", "ZeroDivisionError"]),
    (nothing, ["--reward_funcs", "[rewards.py:needs_a_column]"], ["reward_funcs: ", "needs_a_column", "'solution'"]),
    (
        nothing,
        ["--policy.model_name_or_path", "./polcy"],
        ["policy.model_name_or_path: cannot load './polcy': there"],
    ),
    (
        nothing,
        ["--critic.model_name_or_path", "./critc"],
        ["critic.model_name_or_path: cannot load './critc': there"],
    ),
    (half_a_file, [], ["policy.model_name_or_path: cannot load 'policy': ", "header"]),
]


@pytest.mark.parametrize(("make", "arguments", "said"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_one_line_names_the_field_and_the_remedy(
    project: Path, capsys: pytest.CaptureFixture, make: Callable[[Path], None], arguments: list[str], said: list[str]
) -> None:
    make(project)
    capsys.readouterr()
    assert main(["train", "--config", "my.yaml", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("asyppo: error: ")]
    assert err.splitlines()[-1] == line
    assert "Traceback" not in err
    for part in said:
        assert part in line, (part, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config", "my.yaml", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "asyppo: error: device: got 'cuda', but torch finds no GPU; needs 'auto' or 'cpu' here\n"
    )


def test_a_directory_that_cannot_be_written(project: Path, capsys: pytest.CaptureFixture) -> None:
    if os.geteuid() == 0:
        target = "/proc/runs"  # root writes everywhere else
    else:
        (project / "locked").mkdir(mode=0o555)
        target = "locked"
    assert main(["train", "--config", "my.yaml", "--output_dir", target]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"asyppo: error: output_dir: cannot write to {target}/")


def test_in_a_process_of_its_own(project: Path) -> None:
    """A mistake that is found late, when models are loaded and the run has begun."""
    _, arguments, said = next(m for m in MISTAKES if "too_few" in str(m[1]))
    command = [sys.executable, "-m", "asyppo", "train", "--config", "my.yaml", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("asyppo: error: ")
    assert all(part in line for part in said)
    assert "Traceback" not in result.stderr
