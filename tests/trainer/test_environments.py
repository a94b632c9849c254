"""Episodes: turns of the policy and answers of an environment in one sequence, whatever the environment does."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from asyppo.cli.main import main
from asyppo.config import AsyPPOConfig, ConfigError, DataConfig, EnvironmentConfig, TaskConfig, WarmStartConfig
from asyppo.data.tasks import generate_rows
from asyppo.environments import ENVIRONMENTS
from asyppo.environments.protocol import Step, reset, step
from asyppo.environments.word_guessing import WordPuzzles
from asyppo.evaluate import evaluate
from asyppo.models import warm_start
from asyppo.models.warm_start import demonstration
from asyppo.rollout.environments import Played, Playing, environment_of, episode_metrics, playing_of
from asyppo.rollout.environments.calls import Calls, TimedOut
from asyppo.rollout.environments.chat import parsed_turn
from asyppo.rollout.samplers import Response
from asyppo.trainer import AsyPPOTrainer

EOS = 1


class Echo:
    """Says what it hears, backwards; ``p`` ends it with reward 1, the letters in between misbehave."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reset(self, seed: int, first: str = "") -> str:
        self.seed, self.heard = seed, []
        return first

    def step(self, action: str) -> Any:
        self.heard.append(action)
        if action == "r" or "o" in action:
            raise RuntimeError("a\nfault")
        if "n" in action:
            return 3
        if "m" in action:
            time.sleep(5)
        return ("" if action == "p" else action[::-1]), float(action == "p"), action == "p"


class Says:
    """A sampler that says what is in the script of a prompt, turn by turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, scripts: dict[str, list[str]], ends: str = "<eos>"):
        self.tokenizer, self.scripts, self.ends = tokenizer, scripts, ends
        self.calls: list[tuple[list[list[int]], int]] = []
        self.turn: dict[str, Iterator[str]] = {}

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        self.calls.append(([prompt.tolist() for prompt in prompts], max_completion_length))
        responses = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            name = next(name for name in self.scripts if text.startswith(name) or (len(name) > 2 and name in text))
            said = next(self.turn.setdefault(name, iter(self.scripts[name]))) + self.ends
            ids = self.tokenizer(said, add_special_tokens=False)["input_ids"]
            cut = ids[:max_completion_length]
            responses.append(Response(torch.tensor(cut), torch.full((len(cut),), -1.0), len(cut) < len(ids)))
        return responses


def plays(
    tokenizer: PreTrainedTokenizerFast,
    factory: Any = Echo,
    tools: Sequence[Any] = (),
    longest: int = 64,
    **settings: Any,
) -> Playing:
    own = {
        "max_completion_length": 20,
        "environment": EnvironmentConfig(**({"max_parallel": 1, "timeout": None} | settings)),
    }
    config = AsyPPOConfig(**own)
    made = playing_of(environment_of(config, factory, tools), tokenizer, config, [EOS], longest)
    assert made is not None
    return made


def play(playing: Playing, scripts: dict[str, list[str]], rows: list[Any] | None = None, ends: str = "<eos>") -> Any:
    sampler = Says(playing.tokenizer, scripts, ends)
    return sampler, playing(sampler, rows or [{"prompt": name} for name in scripts], 1.0)


def told(tokenizer: PreTrainedTokenizerFast, one: Played) -> tuple[str, str]:
    """The response, and whose its tokens are."""
    text = "".join(tokenizer.convert_ids_to_tokens(one.response.tokens.tolist())).replace("<eos>", ".")
    return text, "".join("p" if own else "e" for own in one.response.policy)


def test_one_sequence_of_what_was_sampled_and_answered(tokenizer: PreTrainedTokenizerFast) -> None:
    sampler, (a, b) = play(plays(tokenizer), {"a": ["bc", "de", "p"], "b": ["p"]})
    # An empty answer is an end-of-sequence token of the environment's.
    assert told(tokenizer, a) == ("bc.cbde.edp..", "pppeepppeeppe")
    assert told(tokenizer, b) == ("p..", "ppe")
    assert a.response.logprob.tolist() == [-1.0 if own else 0.0 for own in a.response.policy]
    assert a.response.reward.tolist() == [0.0] * 11 + [1.0, 0.0]  # at the turn's last token
    assert (a.reward, b.reward, a.response.truncated) == (1.0, 1.0, False)
    assert [(t.start, t.end, t.until, t.action, t.observation) for t in a.response.turns] == [
        (0, 3, 5, "bc", "cb"),
        (5, 8, 10, "de", "ed"),
        (10, 12, 13, "p", ""),
    ]
    # Each turn is a call of the sampler, with the tokens so far.
    assert [[len(prompt) for prompt in prompts] for prompts, _ in sampler.calls] == [[1, 1], [6], [11]]
    assert sampler.calls[2][0][0] == [*a.prompt.tolist(), *a.response.tokens[:10].tolist()]
    assert episode_metrics([a.response, b.response]) == {
        "environment/turns/mean": 2.0,
        "environment/turns/max": 3.0,
        "environment/tokens/mean": 3.0,
        "environment/failures": 0.0,
        "environment/timeouts": 0.0,
        "environment/answers": 4.0,
    }


def test_faults_become_observations_and_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    scripts = {"a": ["o", "n", "p"], "b": ["m", "p"]}
    playing = plays(tokenizer, timeout=0.2, max_parallel=2)
    _, (a, b) = play(playing, scripts)
    # The tokenizer has no letter for most of it, and cuts it off at the limit.
    assert [turn.observation for turn in a.response.turns] == [
        "error: a fault",
        "error: the environment gave no answer",
    ]
    assert (a.response.failures, a.response.timeouts) == (2, 0)
    # One that hangs is left alone: its episode ends, and the next ones have another.
    assert [turn.observation for turn in b.response.turns] == ["error: no answer within 0.2 s"]
    assert (b.response.timeouts, b.response.turns[0].timed_out) == (1, True)
    assert b.environment not in playing.pools[None]
    assert a.environment in playing.pools[None]


def test_environments_answer_while_the_sampler_writes_for_others(tokenizer: PreTrainedTokenizerFast) -> None:
    scripts = {"a": ["bc", "p"], "b": ["c", "d", "p"], "c": ["p"]}
    log: list[str] = []
    written = threading.Event()

    class Slow(Echo):
        def step(self, action: str) -> Any:
            assert written.wait(10)
            log.append(f"answered {action}")
            return super().step(action)

    class Logs(Says):
        def sample(self, prompts: Any, **arguments: Any) -> Any:
            log.append(f"writes for {len(prompts)}")
            if len(prompts) == 2:
                written.set()
            return super().sample(prompts, **arguments)

    sampler = Logs(tokenizer, scripts)
    playing = plays(tokenizer, Slow, waves=2, max_parallel=2)
    found = playing(sampler, [{"prompt": name} for name in scripts], 1.0)
    assert log[:2] == ["writes for 1", "writes for 2"]  # the answers come after that, in any order
    _, plain = play(plays(tokenizer), scripts)
    assert [told(tokenizer, one) for one in found] == [told(tokenizer, one) for one in plain]


def test_limits(tokenizer: PreTrainedTokenizerFast) -> None:
    scripts = {"a": ["bcdef", "p"], "b": ["c", "d", "e"], "c": ["bcdefgh", "abc"], "d": ["bcdefghi", "p"]}
    sampler, played = play(plays(tokenizer, max_turns=2, max_turn_length=9), scripts)
    texts = [told(tokenizer, one) for one in played]
    assert [one.response.truncated for one in played] == [False, True, True, False]
    # So many turns, the last one answered. The tokens of both sides count, with room for an answer; one that does not
    # fit is cut.
    assert texts[1] == ("c.cd.d", "ppeppe")
    assert texts[2] == ("bcdefgh.hgfedcbabc.c", "pppppppp" + "eeeeeee" + "pppp" + "e")
    assert texts[3] == ("bcdefghi.ihgfedcbp..", "ppppppppp" + "eeeeeeee" + "ppe")
    assert sampler.calls[0][1] == 9
    # A turn that was cut off ends the episode, and is not answered.
    _, [one] = play(plays(tokenizer, max_turn_length=3), {"a": ["bcdef"]})
    assert told(tokenizer, one) == ("bcd", "ppp")
    assert (one.response.truncated, one.response.turns[0].observation) == (True, None)
    with pytest.raises(ConfigError, match="a prompt has 3 tokens, needs at most 2 beside max_completion_length 20"):
        play(plays(tokenizer, longest=22), {"abc": ["p"]})
    # Episodes that are too long for the limit of others are sampled by themselves.
    sampler, _ = play(plays(tokenizer, longest=22), {"ab": ["bcdefgh", "p"], "b": ["p"], "c": ["b", "p"]})
    assert [(len(prompts), limit) for prompts, limit in sampler.calls] == [(3, 19), (1, 16), (1, 4)]


def test_how_an_episode_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "ab", "first": "cd"}, {"prompt": "b"}]
    torch.manual_seed(3)
    playing = plays(tokenizer)
    _, (a, b) = play(playing, {"ab": ["p"], "b": ["p"]}, rows)
    assert tokenizer.decode(a.prompt) == "abcd"
    torch.manual_seed(3)
    _, again = play(playing, {"ab": ["p"], "b": ["p"]}, rows)
    assert [again[0].environment.seed, again[1].environment.seed] == [a.environment.seed, b.environment.seed]
    assert a.environment.seed != b.environment.seed
    assert a.environment is again[0].environment  # made once, reset often

    class Broken(Echo):
        def reset(self, seed: int, first: str = "") -> str:
            raise OSError("no disk")

    with pytest.raises(RuntimeError, match="environment Broken: reset failed for the row 'a': OSError: no disk"):
        play(plays(tokenizer, Broken), {"a": ["p"]})


def test_calls_side_by_side() -> None:
    met = threading.Barrier(3)
    assert Calls([lambda i=i: (met.wait(5), i)[1] for i in range(3)], 3).outcomes() == [0, 1, 2]  # type: ignore[misc]

    def fails() -> None:
        raise KeyError("x")

    slow = threading.Event()
    outcomes = Calls([slow.wait, fails, sys.exit, *[lambda: 7] * 5], 1, 0.1).outcomes()
    slow.set()
    assert [type(one) for one in outcomes[:3]] == [TimedOut, KeyError, SystemExit]  # which ends a thread
    assert outcomes[3:] == [7] * 5
    # More that hang than go side by side, whose turn comes after the others'.
    slow.clear()
    assert [type(one) for one in Calls([slow.wait] * 5, 2, 0.05).outcomes()] == [TimedOut] * 5
    slow.set()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (("x", np.float32(0.5), np.bool_(True)), Step("x", 0.5, True)),
        (("x", 10**400, True), Step("error: the environment gave no answer but str, int, bool", failed=True)),
        (("x", 1e39, True), Step("error: the environment gave no answer but str, float, bool", failed=True)),
        (("\ud83d", torch.tensor(0.5), False), Step("?", 0.5)),  # half a letter, which tokenizers refuse
        (AssertionError(), Step("error: AssertionError", failed=True)),
        (SystemExit(), Step("error: SystemExit", failed=True)),
    ],
)
def test_what_is_an_answer(answer: Any, expected: Step) -> None:
    class Answers:
        def step(self, action: str) -> Any:
            if isinstance(answer, BaseException):
                raise answer
            return answer

    assert step(Answers(), "a") == expected


class Counter:
    """TRL's example of an environment, with a reward of its own and a method that waits."""

    def reset(self, **kwargs: Any) -> str | None:
        self.counter = 0
        return "\nIt stands at 0."

    def increment(self, step: int) -> int:
        """Increment the counter.

        Args:
            step: By how much.
        """
        self.counter += step
        return self.counter

    async def fail(self) -> int:
        """Fail."""
        raise ValueError("out of order")

    def get_reward(self) -> float:
        return float(self.counter)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_tools_in_trls_form(chat: PreTrainedTokenizerFast) -> None:
    def double(number: int) -> int:
        """Double a number.

        Args:
            number: Which.
        """
        return 2 * number

    playing = plays(chat, Counter, [double], longest=20_000)
    playing.config.max_completion_length = 2_000
    turns = [call("increment", step=3) + call("double", number=4), call("fail"), call("nothing"), "It is 3."]
    prompt = [{"role": "user", "content": "Count to 3."}]
    _, [one] = play(playing, {"Count": turns}, [{"prompt": prompt}], "<|im_end|>")
    asked = chat.decode(one.prompt)
    assert "Count to 3.\nIt stands at 0.<|im_end|>" in asked
    assert asked.index('"name": "double"') < asked.index('"name": "fail"') < asked.index('"name": "increment"')
    # What the template writes between turns, and nothing else.
    said = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    answers = [["3", "8"], ["error: out of order"], ["error: there is no tool 'nothing', only double, fail, increment"]]
    shown = ["\n".join(f"<tool_response>\n{a}\n</tool_response>" for a in each) for each in answers]
    expected = "".join(turn + said.format(answer) for turn, answer in zip(turns, shown, strict=False))
    assert chat.decode(one.response.tokens) == expected + "It is 3.<|im_end|>"
    own = one.response.tokens[one.response.policy]
    assert chat.decode(own) == "<|im_end|>".join([*turns, ""])
    assert (one.reward, one.response.failures, one.response.truncated) == (3.0, 2, False)
    assert one.response.reward.nonzero().tolist() == [[len(one.response.tokens) - 1]]
    roles = ["assistant", "tool", "tool", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["role"] for message in one.completion] == roles
    assert playing.reward_names == {None: "Counter"}
    rates = episode_metrics([one.response])
    assert (rates["tools/call_frequency"], rates["tools/failure_frequency"]) == (4.0, 0.5)
    with pytest.raises(ConfigError, match="got tools and a prompt that is text"):
        play(playing, {"a": [""]})


def test_malformed_calls_end_an_episode_and_plain_tools_go_on(chat: PreTrainedTokenizerFast) -> None:
    def wait(seconds: float) -> str:
        """Wait.

        Args:
            seconds: How long.
        """
        time.sleep(seconds)
        return "done"

    playing = plays(chat, None, [wait], longest=20_000, timeout=0.2)
    playing.config.max_completion_length = 2_000
    rows = [{"prompt": [{"role": "user", "content": name}]} for name in ("first", "second")]
    scripts = {
        "first": ["<tool_call>{</tool_call>"],
        "second": [call("wait", seconds=2), call("wait", seconds=0), "ok"],
    }
    _, (a, b) = play(playing, scripts, rows, "<|im_end|>")
    assert [len(one.response.turns) for one in (a, b)] == [1, 3]
    assert [turn.observation for turn in b.response.turns] == ["error: no answer within 0.2 s", "done", None]
    assert (b.response.timeouts, a.reward, b.reward) == (1, None, None)


@pytest.mark.parametrize(
    ("given", "reward"),
    [(np.float32(0.5), 0.5), (torch.tensor(2), 2.0), (None, None), pytest.param(10**400, None, id="huge"), ("1", None)],
)
def test_what_an_environment_may_give_at_the_end(
    chat: PreTrainedTokenizerFast, given: Any, reward: float | None
) -> None:
    class Gives(Counter):
        def increment(self, step: int) -> str:
            """Increment the counter, and end the turn of the assistant.

            Args:
                step: By how much.
            """
            return "\ud83d"

        def get_reward(self) -> Any:
            return given

    playing = plays(chat, {"counter": Gives}, longest=20_000)
    playing.config.max_completion_length = 2_000
    row = {"prompt": [{"role": "user", "content": "Count"}], "environment": "counter"}
    scripts = {"Count": [call("increment", step=1), "ok"]}
    if given is None or reward is not None:
        _, [one] = play(playing, scripts, [row], "<|im_end|>")
        assert (one.reward, one.response.turns[0].observation) == (reward, "?")
        assert "<|im_start|>user" in chat.decode(one.response.tokens)  # a tool's answer, in Qwen3's template
        assert "?<|im_end|>" not in chat.decode(one.response.tokens)  # nor the conversation that stands in
    else:
        with pytest.raises(RuntimeError, match=r"get_reward failed .*needs a finite number, or None"):
            play(playing, scripts, [row], "<|im_end|>")
    with pytest.raises(ConfigError, match=r"got a row with the environment \['counter'\]"):
        play(playing, scripts, [row | {"environment": ["counter"]}], "<|im_end|>")


@pytest.mark.parametrize("value", ["9" * 5_000, "[" * 100_000])
def test_a_call_that_nobody_can_read_is_none(chat: PreTrainedTokenizerFast, value: str) -> None:
    text = f'<tool_call>{{"name": "wait", "arguments": {{"seconds": {value}}}}}</tool_call>'
    assert "tool_calls" not in parsed_turn(chat, chat(text)["input_ids"], [], [])


@pytest.mark.parametrize("hangs", ["increment", "get_reward"])
def test_an_environment_that_hangs_is_not_called_again(chat: PreTrainedTokenizerFast, hangs: str) -> None:
    called = []

    class Hangs(Counter):
        def increment(self, step: int) -> int:
            """Increment the counter.

            Args:
                step: By how much.
            """
            called.append("increment")
            return time.sleep(1) or super().increment(step) if hangs == "increment" else super().increment(step)

        def get_reward(self) -> float:
            called.append("get_reward")
            return time.sleep(1) or 1.0 if hangs == "get_reward" else 1.0

    playing = plays(chat, Hangs, longest=20_000, timeout=0.1)
    playing.config.max_completion_length = 2_000
    rows = [{"prompt": [{"role": "user", "content": "Count"}]}]
    _, [one] = play(playing, {"Count": [call("increment", step=3), "ok"]}, rows, "<|im_end|>")
    assert called == ["increment", "get_reward"][: 1 + (hangs == "get_reward")]
    assert (one.reward, one.environment in playing.pools[None]) == (None, False)


def test_an_environment_beside_chat_messages(chat: PreTrainedTokenizerFast) -> None:
    playing = plays(chat, longest=20_000)
    playing.config.max_completion_length = 200
    _, [one] = play(playing, {"abcd": ["bc", "p"]}, [{"prompt": [{"role": "user", "content": "abcd"}]}], "<|im_end|>")
    said = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(one.response.tokens) == f"bc{said.format('cb')}p{said.format('')}"
    assert [m["content"] for m in one.completion] == ["bc", "cb", "p", ""]


def test_what_is_no_environment(tokenizer: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast) -> None:
    class Nothing:
        def reset(self) -> None: ...

    for factory, tools, message in (
        (Nothing, [], "Nothing has no step and no public method"),
        (object, [], "object has no method reset"),
        (Echo, [len], "needs none beside Echo, which has step"),
        (lambda: Echo(1), [], "cannot be made: TypeError"),  # type: ignore[call-arg]
        (Counter, [], "the tokenizer has no chat template"),
    ):
        with pytest.raises(ConfigError, match=message):
            plays(tokenizer, factory, tools)
    with pytest.raises(ConfigError, match=r"the tool play cannot be shown to the policy: .*no docstring"):
        plays(chat, None, [play])


def test_reward_functions_see_environments(tokenizer: PreTrainedTokenizerFast) -> None:
    def heard(prompts: list, completions: list, environments: list, **_: Any) -> list[float]:
        return [10.0 * len(one.heard) for one in environments]

    config = AsyPPOConfig(max_completion_length=20)
    config.eval.num_generations = 1
    playing, rows = plays(tokenizer), [{"prompt": "a"}, {"prompt": "b"}]
    sampler = Says(tokenizer, {"a": ["p"], "b": ["c", "p"]})
    found = evaluate(sampler, tokenizer, rows, [torch.tensor([3]), torch.tensor([4])], [heard], config, playing=playing)
    assert [s["rewards"] for s in found.samples] == [{"heard": 10.0, "Echo": 1.0}, {"heard": 20.0, "Echo": 1.0}]
    assert [s["reward"] for s in found.samples] == [11.0, 21.0]
    assert [s["response_length"] for s in found.samples] == [2, 4]  # the policy's tokens


class Chance:
    """Says one of a to d, and is over at the third; the reward is by chance, too. Some calls fail."""

    def reset(self, seed: int) -> None:
        self.rng, self.left = Random(seed), 3

    def step(self, action: str) -> tuple[str, float, bool]:
        self.left -= 1
        if self.rng.random() < 0.2:
            raise RuntimeError("a")
        return self.rng.choice("abcd"), self.rng.random(), self.left == 0


@pytest.mark.parametrize("algorithm", ["asyppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_training_with_an_environment_is_resumed_to_the_bit(
    algorithm: str, tiny_trainer: Callable[..., AsyPPOTrainer], tiny_config: Callable[..., AsyPPOConfig], prompts: Any
) -> None:
    credit = {"environment_credit": "drop"} if algorithm == "asyppo" else {}

    def trained(name: str, steps: int, **changes: Any) -> tuple[AsyPPOTrainer, list[dict[str, Any]]]:
        config = tiny_config(
            algorithm=algorithm,
            run_name=name,
            max_steps=steps,
            max_completion_length=16,
            environment=EnvironmentConfig(max_turn_length=4),
            report_to=[],
            **credit,
            **changes,
        )
        trainer = tiny_trainer(
            config,
            lambda prompts, completions, **_: [0.5] * len(prompts),
            eval_dataset=prompts[:2],
            environment_factory=Chance,
        )
        result = trainer.train()
        rows = [json.loads(line) for line in (result.run.path / "metrics.jsonl").read_text().splitlines()]
        return trainer, rows

    whole, rows = trained("whole", 3)
    trained("parts", 2)
    parts, _ = trained("parts", 3, resume=True)
    for (name, p), q in zip(whole.policy.named_parameters(), parts.policy.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert all("rewards/Chance/mean" in row for row in rows[1:])
    assert sum(row["environment/failures"] for row in rows[1:]) > 0
    samples = [json.loads(line) for line in (Path(whole.config.output_dir) / "whole" / "samples.jsonl").open()]
    shown = next(row for row in samples if row["split"] == "train" and len(row["turns"]) > 1)
    assert len(shown["policy_tokens"]) == len(shown["tokens"])
    turn = shown["turns"][0]
    assert ("luck" in turn) == (algorithm == "asyppo")
    if algorithm == "asyppo":
        expected = turn["reward"] + turn["value_after"] - turn["value_before"]
        assert turn["luck"] == pytest.approx(expected, abs=1e-5)
        assert turn["value_before"] == shown["value"][turn["end"]]


@pytest.mark.parametrize("sampler", ["generate", pytest.param("continuous", marks=pytest.mark.slow)])
def test_samplers_go_on_from_the_tokens_that_are_there(
    sampler: str, tiny_trainer: Callable[..., AsyPPOTrainer], tiny_config: Callable[..., AsyPPOConfig]
) -> None:
    """A later turn's log-probs are the policy's given all before it, the answers included."""
    config = tiny_config(
        algorithm="grpo",
        sampler=sampler,
        max_completion_length=16,
        environment=EnvironmentConfig(max_turn_length=4, max_turns=3),
    )
    trainer = tiny_trainer(config, lambda prompts, **_: [0.0] * len(prompts), environment_factory=Chance)
    metrics = trainer.step(1).metrics
    assert metrics["environment/turns/mean"] > 1
    assert metrics["environment/tokens/mean"] > 0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


TASKS_OF_ENVIRONMENTS = {
    "calculator": TaskConfig("chain_sum", {"min_terms": 3, "max_terms": 4, "max_digits": 1}),
    "grid_world": TaskConfig("grid_world"),
    "word_guessing": TaskConfig("word_guessing"),
    "second_try": TaskConfig("chain_sum", {"min_terms": 3, "max_terms": 4, "max_digits": 1}),
}


@pytest.mark.parametrize("name", list(ENVIRONMENTS))
def test_environments_that_ship(name: str) -> None:
    """One that knows the environment wins; with mistakes it does not always; what is drawn follows from the seed."""
    rows = generate_rows(DataConfig(task=TASKS_OF_ENVIRONMENTS[name]), 30, 0, set())
    environment = EnvironmentConfig(name=name, max_turns=12)

    def won(noise: float) -> tuple[list[list[str]], int]:
        warm, rng, right = WarmStartConfig(noise=noise, guess=noise), Random(0), 0
        episodes = [demonstration(row, warm, environment, rng) for row in rows]
        for row, parts in zip(rows, episodes, strict=True):
            again = ENVIRONMENTS[name]()
            reset(again, row, 0)
            right += sum(step(again, action).reward for action in parts[::2]) == 1
        return episodes, right

    episodes, right = won(0.0)
    assert right == 30
    assert all(len(parts) % 2 == 0 for parts in episodes)
    assert won(0.0)[0] == episodes
    assert won(1.0)[1] < 30


def test_words_to_guess_are_tokens_and_as_they_are_in_the_prompt() -> None:
    rows = generate_rows(DataConfig(task=TASKS_OF_ENVIRONMENTS["word_guessing"]), 300, 0, set())
    solve = warm_start.solutions(WarmStartConfig(noise=0.0, guess=0.0), EnvironmentConfig(name="word_guessing"))
    tokenizer = warm_start._make_tokenizer(rows, solve, words=True)
    for row in rows[:30]:
        prompt, actions = tokenizer(row["prompt"])["input_ids"], solve(row, Random(0))[::2]
        assert all(len(ids) == 1 and ids[0] in prompt for ids in tokenizer(actions)["input_ids"])


def test_puzzles_of_few_words() -> None:
    puzzles = [WordPuzzles(200, seed, candidates=4, words=6) for seed in (0, 1)]
    rows = [made[i]["metadata"]["words"] for made in puzzles for i in range(200)]
    assert all(len(set(words)) == 4 for words in rows)
    assert len({word for words in rows for word in words}) == 6
    for wrong in ({"words": 1}, {"words": 1000}, {"words": 6, "candidates": 7}):
        with pytest.raises(ValueError, match=r"(words|candidates): got \d+, needs 2 to \d+"):
            WordPuzzles(1, 0, **wrong)


def test_chance_is_a_parameter() -> None:
    [row] = generate_rows(DataConfig(task=TaskConfig("grid_world", {"pits": 0})), 1, 0, set())

    def walked(slip: float, seed: int) -> list[str]:
        world = ENVIRONMENTS["grid_world"](slip=slip)
        reset(world, row, seed)
        return [step(world, move).observation for move in ("up", "up", "up", "left", "left", "left")]

    assert walked(0.0, 0) == walked(0.0, 1)
    assert len({tuple(walked(0.5, seed)) for seed in range(8)}) > 1
    assert walked(0.5, 1) == walked(0.5, 1)
    [row] = generate_rows(DataConfig(task=TASKS_OF_ENVIRONMENTS["calculator"]), 1, 0, set())
    broken = ENVIRONMENTS["calculator"](failure=1.0)
    reset(broken, row, 0)
    assert step(broken, "1 + 1").observation == "error: the calculator is out of order"
    [row] = generate_rows(DataConfig(task=TASKS_OF_ENVIRONMENTS["word_guessing"]), 1, 0, set())
    noisy = ENVIRONMENTS["word_guessing"](noise=1.0)
    reset(noisy, row, 0)
    assert len({step(noisy, "zzzz").observation for _ in range(8)}) > 1


EXAMPLES = Path(__file__).parents[2] / "examples" / "environments"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENVIRONMENTS))
def test_the_examples_train(name: str, tmp_path: Path) -> None:
    small = {"warm_start.steps": 2, "warm_start.batch_size": 8, "warm_start.cache_dir": tmp_path / "cache"}
    small |= {"data.train_size": 20, "data.eval_size": 2, "prompts_per_step": 2, "max_steps": 1, "run_name": "run"}
    small |= {"critic.warmup_steps": 0, "num_generations": 4, "eval.num_generations": 1, "save_total_limit": 1}
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    assert main(["train", "--config", str(EXAMPLES / f"{name}.yaml"), "--output_dir", str(tmp_path), *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"rewards/{name}/mean" in rows[-1]
    assert rows[-1]["environment/turns/mean"] >= 1
