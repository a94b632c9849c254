"""All that a run prints, on both streams: our own lines, and none of another library's."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from asyppo.metrics.introduction import introduction
from asyppo.metrics.samples import completions_table
from asyppo.run.progress import ProgressDisplay

Make = Callable[..., Any]

STEP = r"step \d/2  \d:\d\d elapsed, \d:\d\d left  reward -?\d\.\d{3}  value error \d+\.\d{3}  entropy \d\.\d{3}"
TABLE = [
    r" +step 1 +",
    "┏[━┳]+┓",
    "┃ prompt +┃ completion +┃ digits ┃ advantage ┃",
    "┡[━╇]+┩",
    "│.*│.*│.*│.*│",
    "└[─┴]+┘",
]
LINES = {
    "gpt2": ["critics run one after another: GPT2Model is none of .*"],
    "qwen3": [],
}
AFTER = [
    r"held-out accuracy: \d\.\d{4} -> \d\.\d{4}",
    *(rf"{name}: +runs/mine.*" for name in ("run", "metrics", "report", "samples", "checkpoint")),
]
REWARD = "def digits(completions, **_):\n    return [float(any(c in 'abc' for c in text)) for text in completions]\n"


def is_rows(line: str) -> bool:
    """Whether a line of a table goes on from the one before."""
    return line.startswith("│")


@pytest.mark.slow
@pytest.mark.parametrize("family", LINES)
def test_a_whole_run(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """From a parquet file, with gradient checkpointing: whatever has a bar or a warning of its own."""
    import datasets

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        family, **shape, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    datasets.Dataset.from_list([{"prompt": "abc"[: 1 + i % 3] + "defgh"[i % 5]} for i in range(60)]).to_parquet(
        tmp_path / "rows.parquet"
    )
    (tmp_path / "reward.py").write_text(REWARD)
    settings = {
        "max_steps": 2,
        "prompts_per_step": 2,
        "num_generations": 4,
        "max_completion_length": 4,
        "num_mini_batches": 1,
        "run_name": "mine",
        "reward_funcs": ["reward.py:digits"],
        "policy": {"model_name_or_path": "model", "gradient_checkpointing": family == "qwen3"},
        "critic": {"gradient_checkpointing": family == "qwen3"},
        "data": {"dataset_name": "rows.parquet", "eval_size": 4},
    }
    (tmp_path / "my.yaml").write_text(json.dumps(settings))
    quiet = {"TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONWARNINGS"}
    ran = subprocess.run(
        [sys.executable, "-m", "asyppo", "train", "--config", "my.yaml"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in quiet}
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    before = [
        *LINES[family],
        r"run: +runs/mine",
        r"device: +cpu, computing in float32",
        r"policy: +model, [\d.,]+( million)? parameters",
        r"critics: +2 × model, [\d.,]+( million)? parameters each, computed .*",
        r"prompts: +\d+ of rows.parquet to train on, 4 held out to evaluate on \(data.eval_size\)",
        r"training: +2 steps of 2 prompts with 4 responses each, [\d.]+ passes over the prompts",
    ]
    kinds = [*before, *TABLE, STEP, STEP + r"  held-out accuracy \d\.\d{3}"]
    for text, expected in ((ran.stderr, kinds), (ran.stdout, AFTER)):
        lines = text.splitlines()
        once = [line for i, line in enumerate(lines) if not (is_rows(line) and is_rows(lines[i - 1]))]
        assert len(once) == len(expected), text
        for line, kind in zip(once, expected, strict=True):
            assert re.fullmatch(kind, line), f"{line!r} is no {kind!r} in:\n{text}"


def test_the_introduction(tiny_config: Make, tiny_trainer: Make) -> None:
    def lines(**fields: Any) -> list[str]:
        config = tiny_config(max_steps=4, **fields)
        trainer = tiny_trainer(config, lambda completions, **_: [0.0] * len(completions))
        rows = trainer.train_dataset
        return introduction(config, trainer.policy, trainer.critics, rows, rows[:3] if fields else [])

    size = r"[1-9],\d{3} parameters"
    patterns = [
        r"device: +cpu, computing in float32",
        rf"policy: +qwen3, {size}",
        rf"critics: +2 × qwen3, {size} each, computed together",
        r"prompts: +8 of train_dataset to train on, none held out \(data\.eval_size\)",
        r"training: +4 steps of 3 prompts with 4 responses each, 1\.5 passes over the prompts",
    ]
    for line, pattern in zip(lines(), patterns, strict=True):
        assert re.fullmatch(pattern, line)
    [critic] = [line for line in lines(algorithm="ppo") if line.startswith("critic")]
    assert re.fullmatch(rf"critic: +1 × qwen3, {size} each", critic)
    [critic] = [line for line in lines(critic={"kind": "side"}) if line.startswith("critic")]
    of_layer = r"transformer of width 64 on hidden states of the policy's layer 2"
    assert re.fullmatch(rf"critics: +2 × {of_layer}, [1-9][\d,]+ parameters each, computed together", critic)
    without = lines(algorithm="grpo")
    assert "3 held out to evaluate on" in without[2]
    assert not any(line.startswith("critic") for line in without)


def test_the_table() -> None:
    row = {
        "step": 7,
        "prompt": "[bold]2+3=?" + "x" * 500,
        "completion": "5",
        "rewards": {"right": 1.0, "other": None},
        "truncated": True,
        "advantage": [0.5, 1.0],
    }
    stream = io.StringIO()
    diverged = row | {"completion": "6", "advantage": [None, 1.0]}
    Console(file=stream, width=120).print(completions_table([row, diverged]))
    text = stream.getvalue()
    assert "step 7" in text
    assert "[bold]2+3=?" in text
    assert "…" in text
    assert text.count("(cut off)") == 2
    [first] = [line for line in text.splitlines() if "5 (cut off)" in line]
    assert [cell.strip() for cell in first.split("│")[3:6]] == ["1", "none", "0.75"]
    [second] = [line for line in text.splitlines() if "6 (cut off)" in line]
    assert [cell.strip() for cell in second.split("│")[3:6]] == ["1", "none", "nan"]


def test_a_display_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 4.0, 5.5, 9.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    stream = io.StringIO()
    with ProgressDisplay("read", 5, seconds=3.0, stream=stream) as progress:
        for _ in range(4):
            progress.advance()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["read 2/5", "read 4/5"]
