"""Prompts: where they come from, which are refused, and that held-out ones stay held out."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from asyppo.config import ConfigError, DataConfig, TaskConfig
from asyppo.data.checks import Checks, Need
from asyppo.data.rows import JsonLines, Rows
from asyppo.data.sources import load_eval_rows, load_train_rows
from tests.trainer.rows import jsonl, numbered

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


# --- data sets of one's own ---

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


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
