"""Prompts: where they come from, which are refused, that held-out ones stay held out, and a step's prompts."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from asyppo.config import ConfigError, DataConfig, TaskConfig
from asyppo.data import checks
from asyppo.data.bounds import tokens_per_byte
from asyppo.data.checks import Checks, Fit, Need
from asyppo.data.prompts import prompt_text, prompt_tokens
from asyppo.data.rows import JsonLines, Kept, Rows
from asyppo.data.schedule import Permutation, PromptSchedule
from asyppo.data.sources import load_eval_rows, load_train_rows

SUM = TaskConfig("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})


def test_held_out_prompts_are_never_trained_on() -> None:
    # The generator's row i is Random(seed + i), so these seeds make the same rows but for the first ten.
    config = DataConfig(task=SUM, train_size=40, train_seed=1, eval_size=30, eval_seed=11)
    held_out = load_eval_rows(config)
    train = load_train_rows(config, held_out)
    assert (len(held_out), len(train)) == (30, 40)
    held_out_prompts, train_prompts = ({row["prompt"] for row in rows} for rows in (held_out, train))
    assert (len(held_out_prompts), len(train_prompts)) == (30, 40)  # all different
    assert not held_out_prompts & train_prompts
    alone = {row["prompt"] for row in load_train_rows(config, [])}
    assert held_out_prompts & alone  # there was something to leave out


def test_rows_carry_the_task_and_end_with_the_suffix() -> None:
    [row] = load_eval_rows(DataConfig(task=SUM, eval_size=1, prompt_suffix=" =>"))
    assert row["prompt"] == row["entry"]["question"] + " =>"
    assert row["answer"] == row["entry"]["answer"]
    left, sign, right = row["entry"]["metadata"]["expression"].split()
    assert int(row["answer"]) == int(left) + (1 if sign == "+" else -1) * int(right)


def test_rows_are_a_function_of_the_seed() -> None:
    def prompts(seed: int) -> list[str]:
        return [row["prompt"] for row in load_eval_rows(DataConfig(task=SUM, eval_size=5, eval_seed=seed))]

    assert prompts(3) == prompts(3) != prompts(300)


def test_too_small_a_task() -> None:
    config = DataConfig(task=SUM, train_size=500)  # there are fewer than 2 * 81 different sums
    with pytest.raises(ConfigError, match=r"data\.task: 'chain_sum' .* has only \d+ .* needs 500"):
        load_train_rows(config, [])


@pytest.mark.parametrize(
    "task", [TaskConfig("no_such_task"), TaskConfig("chain_sum", {"min_terms": 0}), TaskConfig("chain_sum", {"x": 1})]
)
def test_a_task_that_cannot_be_made(task: TaskConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.task: got"):
        load_eval_rows(DataConfig(task=task, eval_size=1))


# --- mixtures of tasks ---

OTHER = TaskConfig("basic_arithmetic", {"min_terms": 2, "max_terms": 2}, weight=3.0)


def test_a_mixture_has_each_task_by_its_weight() -> None:
    config = DataConfig(tasks=[SUM, OTHER], train_size=22, eval_size=9)
    held_out = load_eval_rows(config)
    train = load_train_rows(config, held_out)
    assert Counter(row["task"] for row in held_out) == {"chain_sum": 2, "basic_arithmetic": 7}
    assert Counter(row["task"] for row in train) == {"chain_sum": 6, "basic_arithmetic": 16}  # 5.5 is rounded up once
    for row in [*held_out, *train]:
        assert row["entry"]["metadata"]["source_dataset"] == row["task"]
        assert row["prompt"] == row["entry"]["question"] + "\n"


def test_a_mixture_of_one_is_the_task() -> None:
    alone, mixed = (load_eval_rows(DataConfig(**field, eval_size=5)) for field in ({"task": SUM}, {"tasks": [SUM]}))
    assert alone == mixed
    assert all(row["task"] == "chain_sum" for row in alone)


def test_a_task_of_a_mixture_that_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match=r"data\.tasks\[1\]: got 'nope' with \{\}, but"):
        load_eval_rows(DataConfig(tasks=[SUM, TaskConfig("nope")], eval_size=4))


def test_without_reasoning_gym_a_task_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        ConfigError, match=r"data\.task: got 'chain_sum', needs .* pip install 'asyppo\[tasks\]', or set"
    ):
        load_eval_rows(DataConfig(task=SUM, eval_size=4))


def fitting(rows: Any, name: str, tokenizer: Any, config: DataConfig, limit: int, **more: Any) -> Rows:
    """Those that fit ``limit`` tokens."""
    needs = more.pop("needs", ())
    return checks.fitting(rows, name, Checks(config, Fit(tokenizer, limit, **more), needs))


# --- data sets of one's own ---

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def jsonl(path: Path, *rows: Any) -> str:
    """Write rows; text is a line as it stands."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def numbered(count: int, **columns: Any) -> list[dict[str, Any]]:
    """Rows with prompts p0, p1, … and answers 0, 1, …."""
    return [{"prompt": f"p{i}", "answer": i, **columns} for i in range(count)]


def test_json_lines_keep_their_columns_and_stay_in_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": "ä", "answer": 1}, {"prompt": CHAT, "answer": "one", "deep": {"x": [1, None]}}, {"prompt": "c"}]
    name = jsonl(tmp_path / "own.jsonl", rows[0], "", rows[1], "  ", rows[2])
    loaded = load_train_rows(DataConfig(dataset_name=name), [])
    assert list(loaded) == [{"task": "own", **row} for row in rows]  # empty lines are none
    assert loaded[-1]["prompt"] == "c"
    assert isinstance(loaded, Rows)
    assert isinstance(loaded.source, JsonLines)


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk", "directory of files", "DatasetDict"])
def test_tables(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "answer": f"a{i}", "task": f"t{i % 2}"} for i in range(6)]
    table, path = datasets.Dataset.from_list(rows), tmp_path / "own"
    if kind == "parquet":
        path = tmp_path / "own.parquet"
        table.to_parquet(path)
    elif kind == "save_to_disk":
        table.save_to_disk(path)
    elif kind == "DatasetDict":
        datasets.DatasetDict(train=table, test=table).save_to_disk(path)
    else:
        path.mkdir()
        table.to_parquet(path / "train-00000.parquet")
    loaded = load_train_rows(DataConfig(dataset_name=str(path)), [])
    assert list(loaded) == rows  # a column `task` of one's own stays
    assert isinstance(loaded, Rows)
    assert isinstance(loaded.source, datasets.Dataset)  # memory-mapped, not copied


@pytest.mark.parametrize(
    ("name", "content", "answers"),
    [
        ("own.json", '[{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x"}]', [1, "x"]),
        ("own.json", '\n[\n{"prompt": "a",\n "answer": 1}]\n', [1]),
        ("own.json", '{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": "x"}\n', [1, "x"]),
        ("own.json", '{"prompt": "a",\n"answer": 1}', [1]),
        ("own.json", '{"prompt": "a", "answer": 1}', [1]),
        ("own.json", '{"data": [{"prompt": "a", "answer": 1}]}', [1]),
        ("own.json", '{"test": [{"prompt": "b"}],\n"train": [{"prompt": "a", "answer": 1}]}', [1]),
        ("own.csv", 'prompt,answer\n"a, and b",1\nb,2\n', [1, 2]),
        ("own.tsv", "prompt\tanswer\na\tx\nb\ty\n", ["x", "y"]),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, content: str, answers: list[Any]) -> None:
    (tmp_path / name).write_text(content)
    rows = load_train_rows(DataConfig(dataset_name=str(tmp_path / name)), [])
    assert [row["answer"] for row in rows] == answers
    assert rows[0]["prompt"] == ("a, and b" if name == "own.csv" else "a")
    assert rows[0]["task"] == "own"


def test_a_file_of_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"prompt": "a",\n')
    with pytest.raises(ConfigError, match=r"data\.dataset_name: cannot load '.*own\.json': Expecting property name"):
        load_train_rows(DataConfig(dataset_name=str(tmp_path / "own.json")), [])
    (tmp_path / "own.json").write_text("[3]")
    with pytest.raises(ConfigError, match=r"own\.json has 1 bad row: row 1: no row but 3; needs"):
        load_train_rows(DataConfig(dataset_name=str(tmp_path / "own.json")), [])


def test_held_out_prompts_of_a_data_set_are_never_trained_on(tmp_path: Path) -> None:
    # Every prompt twice: neither copy of a held-out one may be trained on. One of them has blanks around it.
    rows = [*numbered(20), *({**row, "prompt": f" {row['prompt']}\n"} for row in numbered(20))]
    config = DataConfig(dataset_name=jsonl(tmp_path / "own.jsonl", *rows), eval_size=8)
    held_out = load_eval_rows(config)
    train = load_train_rows(config, held_out)
    answers = [row["answer"] for row in held_out]
    assert len(held_out) == len(set(answers)) == 8
    assert Counter(row["answer"] for row in train) == {a: 2 for a in range(20) if a not in answers}
    assert list(load_eval_rows(config)) == list(held_out)
    config.eval_seed += 1
    assert list(load_eval_rows(config)) != list(held_out)


def test_held_out_rows_of_their_own(tmp_path: Path) -> None:
    train, test = numbered(10), numbered(3, kind="test")
    path = str(tmp_path / "both")
    datasets.DatasetDict(train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test)).save_to_disk(
        path
    )
    file = jsonl(tmp_path / "test.jsonl", *test)
    for config in (
        DataConfig(dataset_name=path, dataset_test_split="test"),
        DataConfig(dataset_name=path, eval_dataset_name=path),
        DataConfig(dataset_name=path, eval_dataset_name=file),
        DataConfig(dataset_name=jsonl(tmp_path / "train.jsonl", *train), eval_dataset_name=file),
    ):
        held_out = load_eval_rows(config)  # fewer than eval_size: all of them
        assert [row["kind"] for row in held_out] == ["test"] * 3
        assert [row["answer"] for row in load_train_rows(config, held_out)] == list(range(3, 10))
    assert len(load_eval_rows(DataConfig(dataset_name=path, dataset_test_split="test", eval_size=2))) == 2


def test_tasks_can_be_evaluated_on_a_file(tmp_path: Path) -> None:
    [row] = load_eval_rows(DataConfig(task=SUM, eval_size=1))
    file = jsonl(tmp_path / "test.jsonl", {"prompt": row["prompt"].strip()})
    config = DataConfig(task=SUM, eval_dataset_name=file, train_size=80)
    held_out = load_eval_rows(config)
    assert [r["prompt"] for r in held_out] == [row["prompt"].strip()]
    assert row["prompt"] not in [r["prompt"] for r in load_train_rows(config, held_out)]


def test_a_suffix_goes_behind_text(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "own.jsonl", {"prompt": "a"}, {"prompt": CHAT})
    assert [row["prompt"] for row in load_train_rows(DataConfig(dataset_name=name), [])] == ["a", CHAT]
    rows = load_train_rows(DataConfig(dataset_name=name, prompt_suffix=" ="), [])
    assert [row["prompt"] for row in rows] == ["a =", CHAT]


BAD = [
    ('{"prompt": "p", "answer" 3}', "no JSON: Expecting ':' delimiter at column 26"),
    ('["p"]', "no JSON object but ['p']"),
    ("\xff", "no UTF-8: invalid start byte at byte 1"),
    ('{"question": "p"}', "no column 'prompt', only task, question; data.columns gives others that name"),
    ('{"prompt": null}', "prompt: got None, needs text or a list of chat messages"),
    ('{"prompt": 3}', "prompt: got 3, needs text or a list of chat messages"),
    ('{"prompt": " "}', "prompt: got ' ', needs text"),
    ('{"prompt": []}', "prompt: got no chat message, needs at least one"),
    ('{"prompt": ["hello"]}', "prompt: message 1 is 'hello', needs a role and a content, both text"),
    (
        '{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}',
        "prompt: message 2 is {'role': 'user'}, needs a role and a content, both text",
    ),
]


@pytest.mark.parametrize(("line", "fault"), BAD)
def test_a_bad_row_is_named_by_its_number(
    tmp_path: Path, line: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "own.jsonl"
    jsonl(path, *numbered(6))
    with open(path, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    config = DataConfig(dataset_name=str(path), eval_size=2)
    with pytest.raises(ConfigError) as error:
        load_train_rows(config, load_eval_rows(config))
    assert str(error.value) == (
        f"data.bad_rows: own.jsonl has 1 bad row: row 7: {fault}; needs other rows, or 'skip' to leave these out"
    )
    config.bad_rows = "skip"
    with caplog.at_level(logging.WARNING, "asyppo"):
        held_out = load_eval_rows(config)
        train = load_train_rows(config, held_out)
    assert sorted(row["answer"] for row in [*held_out, *train]) == list(range(6))
    assert caplog.messages == [f"data.bad_rows: own.jsonl has 1 bad row: row 7: {fault}; left out"]  # once


def test_many_bad_rows_are_one_line(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "own.jsonl", *(row for i in range(40) for row in ({"prompt": "p"}, "{" * (i + 1))))
    with pytest.raises(
        ConfigError, match=r"has 40 bad rows: row 2: .*; row 4: .*; row 6: .*; and 37 more; needs"
    ) as error:
        load_train_rows(DataConfig(dataset_name=name), [])
    assert "\n" not in str(error.value)
    assert "row 8" not in str(error.value)


@pytest.mark.parametrize("content", ["", "\n\n", '{"question": 1}\n'])
def test_a_data_set_without_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"data: own\.jsonl has no rows with a prompt, needs at least one"):
        load_train_rows(DataConfig(dataset_name=str(tmp_path / "own.jsonl"), bad_rows="skip"), [])


@pytest.mark.parametrize(
    ("different", "repeated", "held_out"),
    [(1, 1, 0), (2, 1, 1), (300, 1, 30), (20, 15, 2), (600, 1, 60), (6000, 1, 512)],
)
def test_how_many_are_held_out_of_a_data_set(tmp_path: Path, different: int, repeated: int, held_out: int) -> None:
    """A tenth of the different prompts, at most 512, where nothing is said."""
    config = DataConfig(dataset_name=jsonl(tmp_path / "own.jsonl", *numbered(different) * repeated))
    eval_rows = load_eval_rows(config)
    assert len(eval_rows) == held_out
    assert len(load_train_rows(config, eval_rows)) == (different - held_out) * repeated


def test_a_data_set_that_is_all_held_out(tmp_path: Path) -> None:
    config = DataConfig(dataset_name=jsonl(tmp_path / "own.jsonl", *numbered(5)), eval_size=512)
    with pytest.raises(
        ConfigError, match=r"data\.eval_size: got 512, but all 5 different prompts of own\.jsonl are held"
    ):
        load_train_rows(config, load_eval_rows(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset_name": "/no/such.jsonl"}, "data.dataset_name: got '/no/such.jsonl', but there is no such file"),
        ({"dataset_name": "no/such.parquet"}, "data.dataset_name: got 'no/such.parquet', but there is no such file"),
        ({"dataset_name": "./nowhere"}, "data.dataset_name: got './nowhere', but there is no such file or directory"),
        (
            {"dataset_name": "{tmp}/own.xlsx"},
            "needs a .jsonl, .ndjson, .json, .parquet, .csv, .tsv file, a directory or a hub name",
        ),
        ({"dataset_name": "{tmp}/broken.parquet"}, "data.dataset_name: cannot load '{tmp}/broken.parquet': "),
        ({"dataset_name": "{tmp}/empty"}, "data.dataset_name: cannot load '{tmp}/empty': "),
        ({"dataset_name": "nobody/nothing"}, "data.dataset_name: cannot load 'nobody/nothing': "),
        (
            {"dataset_name": "{tmp}/both", "dataset_train_split": "main"},
            "data.dataset_train_split: got 'main', but the data set has the splits train",
        ),
        (
            {"dataset_name": "{tmp}/both", "dataset_test_split": "dev"},
            "data.dataset_test_split: got 'dev', but the data set has the splits train",
        ),
        (
            {"dataset_name": "{tmp}/own.jsonl", "eval_dataset_name": "{tmp}/both"},
            "data.dataset_test_split: got 'test', but the data set has the splits train",
        ),
        (
            {"dataset_name": "{tmp}/own.jsonl", "dataset_test_split": "test"},
            "data.dataset_test_split: got 'test', but '{tmp}/own.jsonl' has no splits; name the held-out rows in "
            "data.eval_dataset_name",
        ),
        (
            {"dataset_name": "{tmp}/own.jsonl", "eval_dataset_name": "/no.jsonl"},
            "data.eval_dataset_name: got '/no.jsonl'",
        ),
    ],
)
def test_a_data_set_that_cannot_be_had(
    tmp_path: Path, fields: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # it tries for half a minute otherwise
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    jsonl(tmp_path / "own.jsonl", *numbered(3))
    (tmp_path / "own.xlsx").write_text("prompt\n")
    (tmp_path / "broken.parquet").write_text("PAR1")
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict(train=datasets.Dataset.from_list(numbered(3))).save_to_disk(tmp_path / "both")
    config = DataConfig(**{key: value.format(tmp=tmp_path) for key, value in fields.items()}, eval_size=1)
    with pytest.raises(ConfigError) as error:
        load_train_rows(config, load_eval_rows(config))
    assert message.format(tmp=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# --- tokens ---

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% if think %}p{% endif %}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One that begins text with <bos>, which its chat template writes, too."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.add_special_tokens(["<bos>"])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )


def test_tokens_of_text_and_of_messages(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    bos, ids = chat_tokenizer.bos_token_id, {c: i for i, c in enumerate("abcdefghijklmnop", 3)}
    messages = [{"role": "h", "content": "bc", "name": None}, {"role": "i", "content": "d"}]
    tokens = prompt_tokens(["ab", messages, "<bos>ab"], chat_tokenizer, {"think": True})
    # Each begins with exactly one <bos>, whoever writes it.
    assert tokens == [[bos, ids["a"], ids["b"]], [bos, *(ids[c] for c in "hbcidap")], [bos, ids["a"], ids["b"]]]
    assert prompt_tokens([messages], chat_tokenizer)[0] == tokens[1][:-1]
    assert prompt_tokens([messages], chat_tokenizer)[0] == chat_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_messages_need_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"prompts are chat messages, but the tokenizer has no chat template; needs"):
        prompt_tokens([CHAT], tokenizer)
    with pytest.raises(ConfigError, match="has no chat template"):
        fitting([{"prompt": CHAT}], "train_dataset", tokenizer, DataConfig(), 10)


def test_prompts_as_text_to_read() -> None:
    assert prompt_text("a") == "a"
    assert prompt_text(CHAT) == "system: s\nuser: u"


@pytest.mark.parametrize("of_messages", [False, True])
@pytest.mark.parametrize(
    ("limit", "own", "reason"),
    [
        (6, None, "the models' positions less max_completion_length"),
        (6, 5, "data.max_prompt_length"),
        (5, 6, "the models' positions less max_completion_length"),
    ],
)
def test_long_prompts(
    chat_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    of_messages: bool,
    limit: int,
    own: int | None,
    reason: str,
) -> None:
    def prompt(length: int) -> Any:  # <bos>, the role, the content, and the beginning of the answer
        return [{"role": "h", "content": "b" * (length - 3)}] if of_messages else "b" * (length - 1)

    longest = min(limit, own or limit)
    rows = [{"prompt": prompt(n), "n": n} for n in (longest, longest + 1, 4, longest + 3)]
    config = DataConfig(max_prompt_length=own)
    with pytest.raises(ConfigError) as error:
        fitting(rows, "train_dataset", chat_tokenizer, config, limit)
    assert str(error.value).startswith(
        f"data.long_prompts: train_dataset has 2 prompts that are too long: row 2: {longest + 1} tokens, needs at most "
        f"{longest}, {reason}; row 4: "
    )
    assert f"; row 4: {longest + 3} tokens" in str(error.value)
    config.long_prompts = "skip"
    with caplog.at_level(logging.WARNING, "asyppo"):
        assert [row["n"] for row in fitting(rows, "train_dataset", chat_tokenizer, config, limit)] == [longest, 4]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("; left out")
    with pytest.raises(ConfigError, match="train_dataset has no prompt that can be used"):
        fitting(rows[1:2], "train_dataset", chat_tokenizer, config, limit)


def test_numbers_of_a_file_survive_what_was_left_out_before(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    name = jsonl(tmp_path / "own.jsonl", "{", *numbered(3), {"prompt": "b" * 20})
    rows = load_train_rows(DataConfig(dataset_name=name, bad_rows="skip"), [{"prompt": "p1"}])
    with pytest.raises(ConfigError, match=r"own\.jsonl has 1 prompt that is too long: row 5: 21 tokens"):
        fitting(rows, "train_dataset", chat_tokenizer, DataConfig(), 10)
    fit = fitting(rows, "train_dataset", chat_tokenizer, DataConfig(long_prompts="skip"), 10)
    assert [row["answer"] for row in fit] == [0, 2]


def test_a_row_that_the_template_refuses(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": [{"role": role, "content": "a"}]} for role in ("user", "tool", "user")]
    with pytest.raises(
        ConfigError, match=r"1 bad row: row 2: prompt: got .*, but the chat template refuses it: no tools here; needs"
    ):
        fitting(rows, "train_dataset", chat_tokenizer, DataConfig(), 10)
    assert len(fitting(rows, "train_dataset", chat_tokenizer, DataConfig(bad_rows="skip"), 10)) == 2


def test_a_prompt_without_tokens(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyppo.data.checks.prompt_tokens", lambda prompts, *_: [[] for _ in prompts])
    with pytest.raises(ConfigError, match=r"row 1: prompt: got 'a', but it has no tokens"):
        fitting([{"prompt": "a"}], "train_dataset", tokenizer, DataConfig(), 10)


def test_no_rows_at_all_are_no_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(fitting([], "eval_dataset", tokenizer, DataConfig(), 10)) == 0


def test_text_does_not_end_with_what_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    for single, begin in (("$A <eos>", []), ("<pad> $A <eos> <pad>", [0])):
        made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        special = [("<pad>", 0), ("<eos>", 1)]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        adding = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", bos_token="<pad>")
        # An end that the text has itself stays.
        assert prompt_tokens(["ab", "<pad>ab", "b<eos>"], adding) == [[*begin, 3, 4], [0, 3, 4], [*begin, 4, 1]]


def test_a_begun_answer_goes_on(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """Beside a prompt whose answer has not begun; blocks and tool calls are read as text."""
    user, begun = {"role": "h", "content": "b"}, {"role": "assistant", "content": "cd"}
    blocks = {"role": "h", "content": [{"type": "text", "text": "b"}]}
    call = {"role": "j", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    tokens = prompt_tokens([[user, begun], [user], [blocks, begun], [call, user]], chat_tokenizer)
    texts = ["".join(chat_tokenizer.convert_ids_to_tokens(ids)) for ids in tokens]
    assert texts == ["<bos>hbacd", "<bos>hba", "<bos>hbacd", "<bos>jhba"]
    assert prompt_text([blocks, call]) == "h: b\nj: "


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a\ud83d", r"prompt: half a surrogate pair, '\ud83d', at character 2, needs the whole character"),
        (
            [{"role": "h", "content": "\ude00"}],
            r"prompt: message 1 is no text: half a surrogate pair, '\ude00', at character 1, needs the whole character",
        ),
        ("ac", "prompt: got 'ac', but its token 'c' is number 5, beyond the models' 5 embeddings; needs the tokenizer"),
        (
            [{"role": "h", "content": [{"type": "image"}]}],
            "prompt: message 1 has a block of type 'image' in its content, needs blocks of text: the models here read",
        ),
        ([{"role": "h", "content": None}], "prompt: message 1 is {'role': 'h', 'content': None}, needs a role and a"),
        ([{"role": "assistant", "content": ""}], None),
    ],
)
def test_prompts_that_cannot_be_read(
    tokenizer: PreTrainedTokenizerFast,
    chat_tokenizer: PreTrainedTokenizerFast,
    prompt: Any,
    fault: str | None,
    tmp_path: Path,
) -> None:
    name = jsonl(tmp_path / "own.jsonl", {"prompt": "ab"}, {"prompt": prompt})
    fit = Fit(tokenizer, 10, vocab_size=5) if isinstance(prompt, str) else Fit(chat_tokenizer, 10)
    with nullcontext() if fault is None else pytest.raises(ConfigError) as error:
        load_train_rows(DataConfig(dataset_name=name), [], Checks(DataConfig(dataset_name=name), fit))
    assert fault is None or f"own.jsonl has 1 bad row: row 2: {fault}" in str(error.value)


def test_a_tokenizer_that_refuses_a_text(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise TypeError("no\nsuch text")

    monkeypatch.setattr("asyppo.data.checks.prompt_tokens", refuse)
    with pytest.raises(ConfigError, match=r"row 1: prompt: got 'a', but the tokenizer refuses it: no such text; needs"):
        fitting([{"prompt": "a"}], "train_dataset", tokenizer, DataConfig(), 10)


def test_columns_that_rewards_need_are_looked_for_in_every_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, *numbered(3), {"prompt": "b", "other": 1}]
    config = DataConfig(dataset_name=jsonl(tmp_path / "own.jsonl", *rows))

    def load(*needs: Need) -> Any:
        return [row["prompt"] for row in load_train_rows(config, [], Checks(config, needs=needs))]

    with pytest.raises(
        ConfigError, match=r"2 bad rows: row 1: no column 'answer', which the reward function f needs; row 5: no column"
    ):
        load(Need("f", ("answer",)))
    with pytest.raises(ConfigError, match=r"^reward_funcs: f needs a column 'x', but the data has task, answer, other"):
        load(Need("f", ("x",)))
    # Of built-in functions one has to know what is right.
    either = Need("exact_match", (), ("answer",)), Need("mine", (), ("other",))
    with pytest.raises(ConfigError, match=r"1 bad row: row 1: no column 'answer', which the reward function exact"):
        load(*either)
    assert len(load(either[0], Need("f", ()))) == 5
    config.bad_rows = "skip"
    assert load(Need("f", ("answer",))) == ["p0", "p1", "p2"]


# --- the rows of a step ---


def test_schedule_passes_over_all_rows_before_any_repeats() -> None:
    schedule = PromptSchedule(num_rows=10, prompts_per_step=4, seed=0)
    drawn = [i for step in range(5) for i in schedule.rows_of_step(step)]  # two passes
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn[:10] != list(range(10))


def test_schedule_is_a_function_of_seed_and_step() -> None:
    schedule = PromptSchedule(num_rows=10, prompts_per_step=4, seed=0)
    late_first = [schedule.rows_of_step(step) for step in (7, 2, 7, 0)]
    fresh = PromptSchedule(num_rows=10, prompts_per_step=4, seed=0)
    assert late_first == [fresh.rows_of_step(step) for step in (7, 2, 7, 0)]
    assert PromptSchedule(10, 4, seed=1).rows_of_step(0) != fresh.rows_of_step(0)


def test_schedule_of_more_prompts_than_rows() -> None:
    rows = PromptSchedule(num_rows=3, prompts_per_step=8, seed=0).rows_of_step(0)
    assert len(rows) == 8
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_schedule_needs_rows() -> None:
    with pytest.raises(ConfigError, match="training rows"):
        PromptSchedule(0, 4, seed=0)


def test_columns_by_other_names_and_some_of_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{i}", "final_answer": str(i)}) + "\n" for i in range(30)))
    columns = {"question": "prompt", "final_answer": "answer"}
    config = DataConfig(dataset_name=str(file), columns=columns, max_train_rows=12, eval_size=5, prompt_suffix="?")
    held_out = load_eval_rows(config)
    rows = load_train_rows(config, held_out)
    assert all(row["prompt"] == f"q{row['answer']}?" and "question" not in row for row in [*held_out, *rows])
    assert len(rows) == 12
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}
    again = load_train_rows(config, held_out)
    assert [row["answer"] for row in again] == [row["answer"] for row in rows]
    config.train_seed = 2
    assert [row["answer"] for row in load_train_rows(config, held_out)] != [row["answer"] for row in rows]
    config.max_train_rows = None
    assert len(load_train_rows(config, held_out)) == 25
    config.columns = {}
    with pytest.raises(ConfigError, match=r"no column 'prompt', .*, final_answer; data\.columns gives"):
        load_eval_rows(config)


# --- the order of a pass ---


@pytest.mark.parametrize("count", [*range(1, 40), 63, 64, 65, 1000, 4099])
def test_a_permutation_is_a_bijection(count: int) -> None:
    for key in ("a", "b"):
        numbers = Permutation(count, key)(np.arange(count))
        assert sorted(numbers.tolist()) == list(range(count))
    assert count < 8 or (numbers != Permutation(count, "a")(np.arange(count))).any()


def test_all_permutations_come_alike_often() -> None:
    """Chi-square over the 24 of four numbers, each expected 60 times: above 60 in one of 30,000 draws."""
    drawn = Counter(tuple(Permutation(4, f"pass {i}")(np.arange(4)).tolist()) for i in range(24 * 60))
    assert len(drawn) == 24
    assert sum((n - 60) ** 2 / 60 for n in drawn.values()) < 60


def test_a_step_of_many_rows_takes_no_memory() -> None:
    import tracemalloc

    schedule = PromptSchedule(10**12, 64, seed=0)
    tracemalloc.start()
    rows = schedule.rows_of_step(10**9)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert len(set(rows)) == 64
    assert max(rows) > 10**11


def test_numbers_without_some() -> None:
    for left_out in ([], [0], [9], [0, 1, 2], [2, 3, 7, 9], list(range(10))):
        kept = Kept(10, left_out)
        assert list(kept) == [i for i in range(10) if i not in left_out]
        assert kept[1:3] == list(kept)[1:3]
    with pytest.raises(IndexError):
        Kept(3, [1])[2]


# --- how many tokens a text has at most ---


def byte_level(normalizer: Any = None, single: str = "$A", **changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *letters, "ab", "abc"])}
    made = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")], **changes))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        made.normalizer = normalizer
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(min_size=1, max_size=12), st.booleans())
def test_no_text_has_more_tokens_than_the_bound(text: str, nfc: bool) -> None:
    own = NFC if nfc else PLAIN
    assert 1 <= len(own(text)["input_ids"]) <= len(text.encode()) * (3 if nfc else 1)


PLAIN, NFC = byte_level(), byte_level(normalizers.NFC())


def test_of_which_tokenizers_a_bound_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokens_per_byte(PLAIN), tokens_per_byte(NFC), tokens_per_byte(tokenizer)) == (1, 3, None)
    for unknown in (byte_level(normalizers.NFKC()), byte_level(dropout=0.5), byte_level(end_of_word_suffix="</w>")):
        assert tokens_per_byte(unknown) is None
    own = byte_level(single="<eos> $A <eos>")
    assert Fit(own, 10).certain_bytes(10) == 8
    assert Fit(own, 10, vocab_size=100).certain_bytes(10) == 0  # it has tokens that the models have not


def test_what_certainly_fits_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what does not is counted: the same rows are found as by tokenizing all."""
    seen: list[str] = []

    def counted(prompts: Any, *rest: Any) -> Any:
        seen.extend(prompts)
        return prompt_tokens(prompts, *rest)

    monkeypatch.setattr(checks, "prompt_tokens", counted)
    rows = [{"prompt": text} for text in ("xyz", "abcabcabc", "x" * 6, "x" * 5)]
    found = fitting(rows, "rows", PLAIN, DataConfig(long_prompts="skip"), 5)
    assert [row["prompt"] for row in found] == ["xyz", "abcabcabc", "x" * 5]
    assert seen == ["abcabcabc", "x" * 6]
