"""The warm start: solutions, tokenizer, cache."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyppo.config import ConfigError, DataConfig, EnvironmentConfig, ModelShape, TaskConfig, WarmStartConfig
from asyppo.data.sources import load_train_rows
from asyppo.models import warm_start
from asyppo.rewards.built_in import reasoning_gym
from asyppo.run.durable import WriteError

CPU = torch.device("cpu")
DATA = DataConfig(task=TaskConfig("chain_sum", {"min_digits": 1, "max_digits": 2}), train_size=200)
GCD = DataConfig(task=TaskConfig("gcd", {"min_numbers": 2, "max_numbers": 2, "max_value": 60}), train_size=200)
SUM, PAIR = {"expression": "4 - 1 + 7"}, {"numbers": [49, 29]}
SHAPE = ModelShape(16, 1, 2, 1, 32)


@pytest.mark.parametrize("data", [DATA, GCD], ids=["chain_sum", "gcd"])
def test_solutions_without_noise_are_right(data: DataConfig) -> None:
    rng = random.Random(0)
    assert warm_start.chain_sum_solution(SUM, 0.0, 0.0, rng) == "3, <answer>10</answer>"
    assert warm_start.gcd_solution(PAIR, 0.0, 0.0, rng) == "20, 9, 2, 1, 0, <answer>1</answer>"
    rows = load_train_rows(data, [])
    solutions = [warm_start.worked_solution(r, 0.0, 0.0, rng) for r in rows]
    assert reasoning_gym([], solutions, entry=[r["entry"] for r in rows]) == [1.0] * len(rows)


@pytest.mark.parametrize(
    ("solution", "metadata", "answer"),
    [(warm_start.chain_sum_solution, SUM, 10), (warm_start.gcd_solution, PAIR, 1)],
    ids=["chain_sum", "gcd"],
)
def test_solutions_with_noise_or_a_guess_are_often_wrong_but_well_formed(
    solution: warm_start.Solution, metadata: dict, answer: int
) -> None:
    rng = random.Random(0)
    for noise, guess in ((0.5, 0.0), (0.0, 1.0)):
        solutions = [solution(metadata, noise, guess, rng) for _ in range(300)]
        right = sum(f"<answer>{answer}</answer>" in s for s in solutions) / 300
        assert 0.02 < right < 0.6
        assert all(s.count("<answer>") == s.count("</answer>") == 1 for s in solutions)


def test_solutions_that_keep_to_a_wrong_rule() -> None:
    rng = random.Random(0)
    nines = {"expression": "27 + 9 - 9 + 19 - 3"}
    wrong = "26, 27, 46, <answer>43</answer>"
    assert warm_start.chain_sum_solution(nines, 0.0, 0.0, rng, 1.0) == wrong
    some = [warm_start.chain_sum_solution(nines, 0.0, 0.0, rng, 0.7) for _ in range(300)]
    assert set(some) == {wrong, warm_start.chain_sum_solution(nines, 0.0, 0.0, rng)}
    assert 0.6 < some.count(wrong) / 300 < 0.8
    assert warm_start.chain_sum_solution(nines, 0.0, 1.0, rng, 1.0).startswith("<answer>")
    with pytest.raises(ConfigError, match=r"warm_start\.wrong_rule: got 0\.5, needs 0 for 'gcd': only chain_sum has"):
        warm_start.build(WarmStartConfig(wrong_rule=0.5), GCD, [], CPU)


def test_build_and_cache(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = load_train_rows(DATA, [])
    config = WarmStartConfig(SHAPE, ModelShape(8, 1, 2, 1, 16), steps=3, batch_size=4, cache_dir=str(tmp_path))
    policy_path, critic_path = warm_start.build(config, DATA, rows, CPU)
    assert "teach the policy" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    policy, critic = (AutoModelForCausalLM.from_pretrained(path) for path in (policy_path, critic_path))
    assert policy.config.vocab_size == critic.config.vocab_size == len(tokenizer)
    assert (policy.config.hidden_size, critic.config.hidden_size) == (16, 8)
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    for row in rows[:20]:
        text = row["prompt"] + "-3, <answer>42</answer>"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert warm_start.build(config, DATA, rows, CPU) == (policy_path, critic_path)
    assert "teach" not in capsys.readouterr().err
    other = WarmStartConfig(SHAPE, SHAPE, steps=4, batch_size=4, cache_dir=str(tmp_path))
    assert warm_start.build(other, DATA, rows, CPU)[0] != policy_path


def test_another_task_is_refused(tmp_path: Path) -> None:
    config, data = WarmStartConfig(cache_dir=str(tmp_path)), DataConfig(task=TaskConfig("leg_counting"))
    with pytest.raises(ConfigError, match=r"data\.task\.name: got 'leg_counting', needs one of chain_sum, gcd"):
        warm_start.build(config, data, [], CPU)


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / ".warm-start-old-1", tmp_path / ".warm-start-new-1"
    for left in (old, new):
        (left / "policy").mkdir(parents=True)
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    config = WarmStartConfig(SHAPE, SHAPE, steps=1, batch_size=4, cache_dir=str(tmp_path))
    policy_path, _ = warm_start.build(config, DATA, load_train_rows(DATA, []), CPU)
    assert {path.name for path in tmp_path.iterdir()} == {policy_path.parent.name, new.name}


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = WarmStartConfig(SHAPE, SHAPE, steps=1, batch_size=4, cache_dir=str(tmp_path / "file"))
    with pytest.raises(WriteError, match=r"cannot write .*file/warm-start-.*: (Not a directory|File exists)"):
        warm_start.build(config, DATA, load_train_rows(DATA, []), CPU)


def test_turns_are_learned_and_answers_are_not(tmp_path: Path) -> None:
    rows = load_train_rows(DATA, [])
    config = WarmStartConfig(SHAPE, SHAPE, steps=1, batch_size=4, cache_dir=str(tmp_path))
    environment = EnvironmentConfig(name="calculator", params={"failure": 0.5})
    plain, _ = warm_start.build(config, DATA, rows, CPU)
    policy_path, _ = warm_start.build(config, DATA, rows, CPU, environment)
    assert policy_path != plain
    assert warm_start.build(config, DATA, rows, CPU, EnvironmentConfig())[0] == plain
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    [(tokens, labels)] = warm_start._encoded(tokenizer, [["4 - 1", "3", "<answer>3</answer>", ""]])
    assert tokenizer.decode(tokens) == "4 - 1<eos>3<answer>3</answer><eos><eos>"
    own = [token for token, label in zip(tokens, labels, strict=True) if label == token]
    assert tokenizer.decode(own) == "4 - 1<eos><answer>3</answer><eos>"
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))


@pytest.mark.parametrize(
    ("environment", "task", "message"),
    [
        ({"name": "own.py:Env"}, DATA.task, "environment.name: got 'own.py:Env', needs one of calculator"),
        ({"name": "grid_world"}, DATA.task, "data.task.name: got 'chain_sum', needs grid_world with environment.name"),
        (
            {"name": "grid_world", "params": {"slip": 2}},
            TaskConfig("grid_world"),
            "environment.params: got {'slip': 2}",
        ),
        ({"name": "second_try"}, TaskConfig("leg_counting"), "data.task.name: got 'leg_counting', needs one of chain_"),
    ],
)
def test_an_environment_without_episodes_to_learn_from(environment: dict, task: TaskConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        warm_start.build(WarmStartConfig(), DataConfig(task=task), [], CPU, EnvironmentConfig(**environment))
    assert str(error.value).startswith(message)
