"""Whatever JSON holds, in whatever column: rows are used, left out, or refused in one line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyppo.config import ConfigError, DataConfig
from asyppo.data.checks import Checks, Fit, fitting
from asyppo.data.prompts import prompt_tokens
from asyppo.data.sources import load_eval_rows, load_train_rows
from asyppo.evaluate import evaluate
from asyppo.metrics.samples import rounded
from asyppo.rewards.computing import RewardError
from asyppo.rewards.function import resolve_reward_funcs

LETTERS = st.text(st.sampled_from("abcd \n<é\ud83d"), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=6,
)
BLOCKS = st.lists(st.fixed_dictionaries({"type": st.just("text") | VALUES, "text": LETTERS | VALUES}), max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | LETTERS, "content": LETTERS | BLOCKS | VALUES},
        optional={"tool_calls": VALUES, "name": VALUES},
    ),
    max_size=3,
)
PROMPTS = LETTERS | MESSAGES | VALUES
NAMES = st.sampled_from(["answer", "task", "entry", "solution", "completions", "trainer_state", "log_extra", "self"])
ROWS = st.dictionaries(NAMES | LETTERS, VALUES, max_size=4).flatmap(
    lambda row: st.fixed_dictionaries(
        {name: st.just(value) for name, value in row.items()}, optional={"prompt": PROMPTS, "messages": PROMPTS}
    )
)
LINES = st.lists(ROWS.map(json.dumps) | VALUES.map(json.dumps) | LETTERS, min_size=1, max_size=6)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with a chat template."""
    made = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% for call in m.tool_calls or [] %}{{ call.name }}"
        "{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>", chat_template=template)


TOKENIZER = tokenizer()


def judge(completions: list, answer: list, **columns: Any) -> list[float]:
    """A reward function of one's own."""
    assert columns["trainer_state"].global_step == 0
    columns["log_extra"]("seen", answer)
    return [1.0] * len(completions)


def use(lines: list[str], bad_rows: Any, make: Callable[..., Any], sampler: Any) -> int:
    """Do with rows what a run does. Returns how many could be used."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "own.jsonl"
        path.write_text("\n".join(lines), errors="surrogatepass")
        data = DataConfig(dataset_name=str(path), eval_size=1, bad_rows=bad_rows, long_prompts=bad_rows)
        config = make(data=data, evaluation={"num_generations": 1})
        funcs = resolve_reward_funcs([judge, "exact_match", "math_verify"])
        checks = Checks(data, Fit(TOKENIZER, 12, vocab_size=3), [func.need for func in funcs])
        held_out = fitting(load_eval_rows(data), "eval_dataset", checks)
        rows = [*load_train_rows(data, held_out, checks), *held_out]
        prompts = [torch.tensor(ids) for ids in prompt_tokens([row["prompt"] for row in rows], TOKENIZER)]
        assert all(0 < len(prompt) <= 12 and int(prompt.max()) < 3 for prompt in prompts)
        if rows:
            result = evaluate(sampler, TOKENIZER, rows, prompts, funcs, config)
            json.dumps([{key: rounded(value) for key, value in sample.items()} for sample in result.samples])
            json.dumps([result.metrics(), result.results()])
        return len(rows)


def check(lines: list[str], make: Callable[..., Any], sampler: Any) -> None:
    """With an error, or with what is left out."""
    for bad_rows in ("error", "skip"):
        message = ""
        try:
            use(lines, bad_rows, make, sampler)
        except (ConfigError, RewardError) as error:
            message = str(error)
        assert "\n" not in message
        message.encode()


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@given(LINES)
@settings(max_examples=60, **QUIET)
def test_rows_never_give_a_traceback(
    tiny_config: Callable[..., Any], scripted_sampler: Callable[..., Any], lines: list[str]
) -> None:
    check(lines, tiny_config, scripted_sampler([[2, 0]]))


@pytest.mark.slow
@given(LINES)
@settings(max_examples=600, **QUIET)
def test_more_rows_never_give_a_traceback(
    tiny_config: Callable[..., Any], scripted_sampler: Callable[..., Any], lines: list[str]
) -> None:
    check(lines, tiny_config, scripted_sampler([[2, 0]]))


def test_some_rows_are_used(tiny_config: Callable[..., Any], scripted_sampler: Callable[..., Any]) -> None:
    lines = [
        '{"prompt": "aa", "answer": "a"}',
        "{",
        '{"prompt": [{"role": "a", "content": null}]}',
        "[" * 2000,
        "9" * 9999,
    ]
    assert use([*lines, '{"prompt": "a", "answer": 1}'], "skip", tiny_config, scripted_sampler([[2, 0]])) == 2
