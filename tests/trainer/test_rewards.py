"""Reward functions: built in and one's own, what they are given, what may come back, and what cuts them off."""

from __future__ import annotations

import copy
import gc
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification, TrainerState

from asyppo.config import ConfigError, DataConfig, TaskConfig
from asyppo.data.checks import Need
from asyppo.data.sources import load_eval_rows
from asyppo.rewards.built_in import exact_match, extract_answer, math_verify, reasoning_gym
from asyppo.rewards.computing import RewardError, Rewards, compute_rewards
from asyppo.rewards.function import resolve_reward_funcs

ROWS: list[dict[str, Any]] = [
    {"prompt": "p", "answer": "1", "extra": "x"},
    {"prompt": "q", "answer": "2", "extra": "y"},
]
CHAT = [{"role": "user", "content": "q"}]


def rewards_of(*funcs: Any, completions: tuple[str, ...] = ("a", "bc"), **options: Any) -> Rewards:
    """Rewards of the rows' completions, one token a character."""
    ids = [list(map(ord, completion)) for completion in completions]
    return compute_rewards(funcs, options.pop("rows", ROWS), completions, ids, **options)


# --- built in ---


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("3, <answer> 7 </answer> and more", "7"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        (" 42\n", "42"),
        ("<answer>unfinished", "<answer>unfinished"),
        ("", ""),
    ],
)
def test_extract_answer(completion: str, answer: str) -> None:
    assert extract_answer(completion) == answer


def test_reasoning_gym_scores_the_extracted_answer() -> None:
    [row, other] = load_eval_rows(DataConfig(task=TaskConfig("chain_sum"), eval_size=2))
    completions = [f"thinking <answer>{row['answer']}</answer>", "<answer>no number</answer>", "of another data set"]
    right, wrong, nobodys = reasoning_gym([], completions, entry=[row["entry"], other["entry"], None])
    assert right == 1
    assert wrong < 1
    assert nobodys is None


def test_exact_match() -> None:
    assert exact_match([], ["<answer>1</answer>", "3", "2 ", "-"], answer=["1", "1", 2, None]) == [1.0, 0.0, 1.0, None]


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", 1),
        (r"so it is $\boxed{\frac{1}{2}}$", "0.25", 0),
        ("<answer>2/4</answer>", r"\frac{1}{2}", 1),
        ("<answer>(x+1)^2</answer>", "$x^2+2x+1$", 1),
        ("<answer>x^2</answer>", "x^2", 1),
        ("<answer>x^2</answer>", "x^3", 0),
        ("3 plus 4 is 7", 7, 1),
        ("3 plus 4 is 8", 7, 0),
        ("I do not know", "7", 0),
        ("", "7", 0),
        ("<answer></answer>", "7", 0),
        ("7", "", None),
        ("7", None, None),
    ],
)
def test_math_verify(completion: str, gold: Any, reward: float | None) -> None:
    assert math_verify([], [completion], answer=[gold]) == [reward]
    assert math_verify([], [[{"role": "assistant", "content": completion}]], solution=[gold]) == [reward]


def test_columns_that_built_in_functions_take() -> None:
    """Where a row has none, it is another function's."""
    rewards = rewards_of("math_verify", "exact_match", "reasoning_gym", rows=[{"prompt": "p"}], completions=("7",))
    assert rewards.by_function == {"math_verify": [None], "exact_match": [None], "reasoning_gym": [None]}
    mixed = [{"prompt": "p", "answer": 7}, {"prompt": "p", "solution": 7}]
    assert rewards_of("math_verify", rows=mixed, completions=("7", "7")).scores == [1.0, 1.0]


# --- what functions are given ---


def test_functions_get_prompts_completions_tokens_and_columns() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [None, 2]

    def modest(completions: list[str]) -> list[float]:
        return [float(len(c)) for c in completions]

    rewards = rewards_of(reward, modest)
    assert rewards.by_function == {"reward": [None, 2.0], "modest": [1.0, 2.0]}
    assert rewards.total == rewards.scores == [1.0, 4.0]  # None is "not mine"
    assert seen.pop("trainer_state").global_step == 0
    assert {name: seen.pop(name).__name__ for name in ("log_extra", "log_metric")} == {
        "log_extra": "log_extra",
        "log_metric": "log_metric",
    }
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["a", "bc"],
        "completion_ids": [[97], [98, 99]],
        "answer": ["1", "2"],
        "extra": ["x", "y"],
    }


def test_chat_messages_are_answered_by_a_chat_message() -> None:
    """As in TRL; text beside them is answered by text. A column that a row has not is None."""
    seen: dict[str, Any] = {}

    def reward(**columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0, 0.0]

    rewards_of(reward, rows=[{"prompt": CHAT}, {"prompt": "q", "answer": 1}])
    assert seen["prompts"] == [CHAT, "q"]
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], "bc"]
    assert seen["answer"] == [None, 1]


def test_columns_that_a_function_needs() -> None:
    def reward(completions: list[str], entry: list, kind: list | None = None, **_: Any) -> list[float]:
        return [0.0]

    own, built_in = resolve_reward_funcs([reward, "math_verify"])
    assert own.need == Need("reward", ("entry",))
    assert built_in.need == Need("math_verify", (), ("answer", "solution"))


# --- several, weights, None, rewards of tokens ---


def constant(*rewards: Any, name: str = "constant") -> Callable[..., Any]:
    """Make a function that returns ``rewards``."""

    def func(**_: Any) -> Any:
        return list(rewards)

    func.__name__ = name
    return func


def test_weights() -> None:
    rewards = rewards_of(constant(1, 2), constant(10, None, name="other"), weights=[0.5, -1])
    assert rewards.by_function == {"constant": [1.0, 2.0], "other": [10.0, None]}  # unweighted
    assert rewards.scores == [-9.5, 1.0]
    with pytest.raises(
        ConfigError, match=r"reward_weights: got \[1\.0\], needs 2, one for each of the reward functions"
    ):
        resolve_reward_funcs(["exact_match", "math_verify"], weights=[1.0])


def test_functions_of_one_name() -> None:
    assert list(rewards_of(constant(1, 2), constant(3, 4), constant(5, 6)).by_function) == [
        "constant",
        "constant#2",
        "constant#3",
    ]


def test_a_sample_that_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "asyppo"):
        rewards = rewards_of(constant(1, None), constant(None, None), step=3)
    assert rewards.scores == [1.0, 0.0]
    assert caplog.messages == [
        "step 3: no reward function has a reward for 1 of 2 samples, which count as 0; the first is sample 1 ('q')"
    ]


@pytest.mark.parametrize("as_type", [list, tuple, np.array, torch.tensor])
def test_rewards_of_tokens(as_type: Any) -> None:
    rewards = rewards_of(constant(1.5, as_type([0.5, 0.25])), constant(2, -1, name="other"), weights=[2, 1])
    assert rewards.by_function == {"constant": [1.5, 0.75], "other": [2.0, -1.0]}
    assert rewards.total[0] == 5.0
    assert isinstance(rewards.total[1], torch.Tensor)
    assert rewards.total[1].tolist() == [1.0, -0.5]  # the other function's number is on the last token
    assert rewards.scores == [5.0, 0.5]
    both = rewards_of(constant([1.0], [0.5, 0.25]), constant(None, [1.0, 2.0]))
    assert [total.tolist() for total in both.total] == [[1.0], [1.5, 2.25]]


def test_a_tensor_of_rewards() -> None:
    def func(completions: list[str]) -> Any:
        return torch.tensor([float(len(c)) for c in completions])

    assert rewards_of(func).scores == [1.0, 2.0]


def test_a_coroutine_function() -> None:
    import asyncio

    async def judge(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return [float(len(c)) for c in completions]

    assert rewards_of(judge).scores == [1.0, 2.0]

    async def inside_a_running_loop() -> Rewards:  # as in a notebook
        return rewards_of(judge)

    assert asyncio.run(inside_a_running_loop()).scores == [1.0, 2.0]


def test_what_functions_log_and_see_of_the_run() -> None:
    """TRL's trainer_state, log_metric and log_extra."""

    def reward(completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("letters", len(completions[0]))
        log_metric("letters", torch.tensor(2.0))
        log_extra("first", [c[0] for c in completions])
        log_extra("odd", [{1}, np.float32(2)])
        return [float(trainer_state.global_step)] * len(completions)

    rewards = rewards_of(reward, trainer_state=TrainerState(global_step=7))
    assert rewards.scores == [7.0, 7.0]
    assert rewards.logged.means() == {"letters": 1.5}
    assert rewards.extra_by_sample == [{"first": "a", "odd": "{1}"}, {"first": "b", "odd": 2.0}]

    def too_few(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("one", [1])
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="too_few, evaluation: logged 1 values of 'one', needs 2, one for each"):
        rewards_of(too_few)


def test_columns_that_are_called_as_what_is_given() -> None:
    names = ("completions", "trainer_state", "log_extra", "completion_ids", "")
    rows = [{"prompt": "p", **dict.fromkeys(names, 1)}] * 2
    assert rewards_of(lambda completions, **_: [float(len(c)) for c in completions], rows=rows).scores == [1.0, 2.0]


# --- sequence classifiers ---


@pytest.fixture
def classifier(tmp_path: Path, tokenizer: Any) -> Path:
    """Directory of one with its tokenizer, whose reward depends on every token."""
    config = Qwen3Config(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        intermediate_size=8, num_labels=1, initializer_range=0.5, pad_token_id=None,
    )  # fmt: skip
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    own.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_a_sequence_classifier(classifier: Path, tokenizer: Any) -> None:
    model = Qwen3ForSequenceClassification.from_pretrained(classifier).eval()
    begun = [*CHAT, {"role": "assistant", "content": "a"}]
    rows = [{"prompt": prompt} for prompt in ("p", "q", [{"role": "user", "content": "qi"}], begun)]
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in ("pa", "qbc", "uqiabc", "uqaab")]
    with torch.no_grad():
        expected = [float(model(input_ids=i).logits) for i in ids]
    [by_name] = resolve_reward_funcs(str(classifier), timeout=1.0)
    assert by_name.name == "judge"
    for func in (by_name, *resolve_reward_funcs(model), *resolve_reward_funcs([model], None, None, [tokenizer])):
        chosen = rows if func.func.tokenizer.chat_template else rows[:2]
        rewards = rewards_of(func, rows=chosen, completions=("a", "bc", "bc", "b")[: len(chosen)])
        assert rewards.scores == pytest.approx(expected[: len(chosen)], abs=1e-5)


def test_a_classifier_that_cannot_be_had(classifier: Path, tmp_path: Path, tiny_lm: Any) -> None:
    tiny_lm().save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"reward_funcs: '.*policy' has no weight score.weight, needs a trained seq"):
        resolve_reward_funcs(str(tmp_path / "policy"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"reward_funcs: cannot load the reward model '.*empty': "):
        resolve_reward_funcs([str(tmp_path / "empty")])
    for file in classifier.glob("token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"the reward model '.*judge' has no tokenizer beside it, needs one in rew"):
        resolve_reward_funcs([str(classifier)])
    with pytest.raises(ConfigError, match="reward_processing_classes: got 1, needs 2, one for each"):
        resolve_reward_funcs(["exact_match", "math_verify"], processing_classes=[None])
    with pytest.raises(ConfigError, match="reward_funcs: got 3, needs a function, a name, or a sequence classifier"):
        resolve_reward_funcs([3])  # type: ignore[list-item]


# --- what is no reward ---


@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, -math.inf, 1e39, pytest.param(-(10**400), id="huge"), "1", {}, [math.nan, 1.0], [1.0, None]],
)
def test_a_reward_that_is_not_finite_is_named_with_its_sample(bad: Any) -> None:
    named = {list: "for a token, needs finite numbers"}.get(type(bad), "needs a finite number or None")
    with pytest.raises(RewardError, match=rf"reward function broken, step 7, sample 1 \('q'\): returned .*{named}"):
        rewards_of(constant(1.0, bad, name="broken"), step=7)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards(count: int) -> None:
    with pytest.raises(
        RewardError, match=f"broken, evaluation: returned {count} rewards, needs 2, one for each sample"
    ):
        rewards_of(constant(*[1.0] * count, name="broken"))


def test_no_list_of_rewards() -> None:
    def broken(**_: Any) -> Any:
        return 1.0

    with pytest.raises(
        RewardError, match=r"broken, evaluation: returned 1\.0, needs a list with one reward for each of 2"
    ):
        rewards_of(broken)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards_of_tokens(count: int) -> None:
    with pytest.raises(
        RewardError, match=rf"sample 1 \('q'\): returned rewards for {count} tokens, needs 2, one for each"
    ):
        rewards_of(constant([1.0], [1.0] * count))


def test_a_function_that_raises_is_named_with_its_sample() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        return [float(len(c)) if c == "a" else int(c) for c in completions]

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(RewardError) as error:
        rewards_of(broken, rows=[{"prompt": "p"}, {"prompt": [{"role": "user", "content": "x" * 90}]}], step=7)
    assert str(error.value) == (
        f"reward function broken, step 7, sample 1 ('user: {'x' * 51}...'): raised TypeError: int() argument must be "
        f"a string, a bytes-like object or a real number, not 'list' ({__file__}:{line})"
    )
    assert isinstance(error.value.__cause__, TypeError)


def test_a_function_that_raises_for_no_sample_alone() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 1:
            raise KeyError("two\nlines")
        return [0.0]

    with pytest.raises(RewardError, match=r"^reward function broken, step 7: raised KeyError: 'two\\nlines' \("):
        rewards_of(broken, step=7)


def test_a_function_that_exits_does_not_end_the_run_without_a_word() -> None:
    def executes(completions: list[str], **_: Any) -> list[float]:
        exec("exit()", {"exit": sys.exit})
        return [0.0]

    with pytest.raises(RewardError, match=r"^reward function executes, step 7, sample 0 \('p'\): raised SystemExit: "):
        rewards_of(executes, step=7)


# --- one's own, by name ---

OWN = """
def reward(completions, **_):
    return [float(len(c)) for c in completions]

class Group:
    @staticmethod
    def inner(completions, **_):
        return [0.0 for c in completions]

number = 3
"""


def test_a_function_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("BONUS = 10\n")
    (tmp_path / "own.py").write_text(OWN.replace("float(len(c))", "neighbour.BONUS + len(c)") + "import neighbour\n")
    file = f"{tmp_path}/own.py"
    [func, inner] = resolve_reward_funcs([f"{file}:reward", f"{file}:Group.inner"])
    assert (func.name, inner.name) == ("reward", "inner")
    assert rewards_of(func, inner).scores == [11.0, 12.0]


def test_a_function_of_a_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "own_rewards_module.py").write_text(OWN)
    assert rewards_of(*resolve_reward_funcs(["own_rewards_module:reward"])).scores == [1.0, 2.0]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "nope",
            "got 'nope', needs one of reasoning_gym, exact_match, math_verify, or one of your own as module:function",
        ),
        ("no_such_module:reward", "got 'no_such_module:reward', but there is no module 'no_such_module'"),
        ("json.nope:reward", "got 'json.nope:reward', but there is no module 'json.nope'"),
        ("/no/such.py:reward", "got '/no/such.py:reward', but there is no file /no/such.py"),
        ("{tmp}/own.py:nope", "has no function 'nope'; it has reward"),
        ("{tmp}/own.py:number", "has no function 'number'; it has reward"),
        ("{tmp}/own.py:", "has no function ''; it has reward"),
        (
            "{tmp}/broken.py:reward",
            "whose import failed: NameError: name 'undefined' is not defined ({tmp}/broken.py:2)",
        ),
        ("{tmp}/needs.py:reward", "whose import failed: ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("{tmp}/script.py:reward", "whose import failed: SystemExit: 0 ({tmp}/script.py:2)"),
    ],
)
def test_a_function_that_cannot_be_had(tmp_path: Path, reference: str, message: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("\nundefined\n")
    (tmp_path / "needs.py").write_text("import no_such_dependency\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError) as error:
        resolve_reward_funcs([reference.format(tmp=tmp_path)])
    assert str(error.value).startswith("reward_funcs: got '")
    assert message.format(tmp=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# --- time limits ---

SLOW = """
import asyncio, os, re, time

calls = 0

def reward(completions, answer, **_):
    global calls
    calls += 1
    [completion] = completions
    if completion == "loop":
        while True:
            pass
    if completion == "compiled":
        re.match("(a+)+$", "a" * 60 + "b")  # for ever, without a look at signals
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise ValueError("no\\nreward")
    if completion == "two":
        return [1.0, 2.0]
    if completion == "tokens":
        return [[0.5] * 6]
    if completion == "log":
        _["log_metric"]("step", _["trainer_state"].global_step)
        _["log_extra"]("seen", [answer[0]])
    return [calls + int(answer[0]) / 10]

async def judge(completions, **_):
    [completion] = completions
    await asyncio.sleep(60 if completion == "loop" else 0.3)
    if completion == "raise":
        raise ValueError("no")
    return [float(len(completion))]
"""


def limited(tmp_path: Path, name: str, timeout: float) -> Any:
    """The function with a time limit."""
    (tmp_path / "slow.py").write_text(SLOW)
    [func] = resolve_reward_funcs([f"{tmp_path}/slow.py:{name}"], timeout)
    return func


def rows_for(*completions: str) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "answer": i} for i in range(len(completions))]


@pytest.mark.parametrize("kind", ["loop", "compiled"])
def test_a_slow_sample_is_cut_off_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    func, completions = limited(tmp_path, "reward", 0.5), ("a", "tokens", kind, "b")
    with caplog.at_level(logging.WARNING, "asyppo"):
        rewards = rewards_of(func, completions=completions, rows=rows_for(*completions), step=2)
    # The process lives from call to call until it is stuck; then another takes its place.
    assert rewards.by_function == {"reward": [1.0, 3.0, None, 1.3]}
    assert rewards.timeouts == {"reward": 1}
    assert caplog.messages[0] == (
        "reward function reward, step 2: cut off after 0.5 s at 1 of 4 samples, the first is sample 2 ('p2')"
    )
    again = rewards_of(func, completions=("a",), rows=rows_for("a"))
    assert (again.by_function, again.timeouts) == ({"reward": [2.0]}, {"reward": 0})
    logged = rewards_of(func, completions=("a", "log"), rows=rows_for("a", "log"), trainer_state=TrainerState())
    assert logged.logged.means() == {"step": 0}
    assert logged.extra_by_sample == [{"seen": None}, {"seen": 1}]
    pid = func.process.process.pid
    os.kill(pid, 0)
    del func.process
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # nothing is left running


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("die", r"ended its process \(exit status 3\)"),
        ("raise", r"raised ValueError: no reward \(.*slow\.py:18\)"),
        ("two", r"returned \[1\.0, 2\.0\] for one sample, needs a list with one reward"),
    ],
)
def test_failures_in_a_process_of_its_own(tmp_path: Path, completion: str, message: str) -> None:
    func, completions = limited(tmp_path, "reward", 30), ("a", completion)
    with pytest.raises(RewardError, match=rf"^reward function reward, step 2, sample 1 \('p1'\): {message}"):
        rewards_of(func, completions=completions, rows=rows_for(*completions), step=2)


def test_a_slow_coroutine_is_cut_off(tmp_path: Path) -> None:
    func, completions = limited(tmp_path, "judge", 1.5), ("a", "loop", *["bc"] * 80)
    start = time.monotonic()
    rewards = rewards_of(func, completions=completions, rows=rows_for(*completions))
    assert time.monotonic() - start < 20  # side by side: one after another would take more than 25
    assert rewards.by_function == {"judge": [1.0, None, *[2.0] * 80]}
    assert rewards.timeouts == {"judge": 1}
    with pytest.raises(RewardError, match=r"sample 1 \('p1'\): raised ValueError: no \(.*slow\.py"):
        rewards_of(func, completions=("a", "raise"), rows=rows_for("a", "raise"))


def test_a_time_limit_needs_a_function_that_can_be_imported() -> None:
    for func, name in ((constant(1.0), "constant"), (lambda **_: [1.0], "<lambda>")):
        with pytest.raises(
            ConfigError, match=f"reward_timeout: reward function {name} cannot run in a process of its own"
        ):
            resolve_reward_funcs([func], timeout=1.0)


def test_built_in_functions_under_a_time_limit() -> None:
    funcs = resolve_reward_funcs(["exact_match", "math_verify"], timeout=60)
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "0.5"}]
    rewards = rewards_of(*funcs, completions=("1", "<answer>1/2</answer>"), rows=rows)
    assert rewards.by_function == {"exact_match": [1.0, 0.0], "math_verify": [1.0, 1.0]}
    assert rewards.timeouts == {"exact_match": 0, "math_verify": 0}


STUCK = """
import os
import signal

def reward(started, **_):
    with open(started[0], "w") as file:
        file.write(f"{os.getpid()}\\n")
    while True:
        pass
"""

ABANDONS = """
import os, signal, sys, threading, time
from asyppo.rewards.function import resolve_reward_funcs
from asyppo.rewards.logged import Logged
from transformers import TrainerState

reference, started = sys.argv[1:]
[func] = resolve_reward_funcs([reference], 1000)
given = {"completions": ["a"], "started": [started]}, TrainerState(), Logged()
threading.Thread(target=func, args=given, daemon=True).start()
while not os.path.exists(started) or not open(started).read().endswith("\\n"):
    time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_stuck_process_does_not_outlive_a_killed_trainer(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    started = tmp_path / "started"
    command = [sys.executable, "-c", ABANDONS, f"{tmp_path}/stuck.py:reward", str(started)]
    trainer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert trainer.returncode == -signal.SIGKILL, trainer.stderr
    pid = int(started.read_text())
    deadline = time.monotonic() + 60
    while (Path("/proc") / str(pid)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
