"""Responses of several turns: the policy writes one, an environment answers, and so on, in one sequence of tokens.

The sequence is built of the tokens that were sampled and of those of the answers; nothing is decoded and encoded again.
Episodes take their turns together: a turn is one call of the sampler, and its answers are made side by side, while the
sampler writes for the next wave of episodes, if there are several.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.prompts import Prompt, prompt_text, prompt_tokens
from asyppo.data.rows import Row, short
from asyppo.distributed.processes import divided
from asyppo.environments.protocol import number
from asyppo.environments.turn import Turn
from asyppo.rollout.environments.calls import Calls, TimedOut
from asyppo.rollout.environments.chat import AnswerTokens, Message, parsed_turn
from asyppo.rollout.environments.sessions import Answer, Session, Tool, session
from asyppo.rollout.samplers import Response, Sampler

Factory = Callable[[], Any]


class EnvironmentFailure(RuntimeError):
    """An environment could not begin an episode, or not say what it is worth. The message names it and the row."""

    exit_status = 2


@dataclass
class Episode(Response):
    """A response of several turns, answers included; the log-prob of their tokens is 0."""

    policy: Tensor
    """bool [length]: tokens that the policy drew."""
    reward: Tensor
    """float32 [length]: what the environment gave, each at its turn's last token."""
    turns: list[Turn]
    failures: int
    timeouts: int


@dataclass
class Played:
    """An episode, and what is known of it beside its tokens."""

    prompt: Tensor
    """int64 [length]: with the first observation, and the tools."""
    response: Episode
    completion: str | list[Message]
    """Text, or, where the prompt is chat messages, those of both sides."""
    environment: Any
    """The object it was played with; None on other ranks, and where there are tools alone."""
    reward: float | None
    """What the environment gave in all; None where it gives no rewards."""


@dataclass
class _Open:
    """An episode under way."""

    prompt: list[int]
    text: bool
    """Whether the prompt is text."""
    tokens: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    policy: list[bool] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    failures: int = 0
    timeouts: int = 0
    truncated: bool = False
    over: bool = False

    def add(self, tokens: Sequence[int], logprob: Sequence[float] | None = None) -> None:
        """Add tokens of a turn, or, without ``logprob``, of an answer."""
        self.tokens += tokens
        self.logprob += [0.0] * len(tokens) if logprob is None else logprob
        self.policy += [logprob is not None] * len(tokens)
        self.reward += [0.0] * len(tokens)

    def stop(self) -> None:
        """End it before its time."""
        self.truncated = self.over = True


@dataclass(frozen=True)
class _Asked:
    """Answers under way."""

    turns: dict[int, Message]
    """By episode; of this rank's."""
    calls: Calls


class Playing:
    """``playing(sampler, rows)``: one episode for each of ``rows``."""

    def __init__(
        self,
        factories: Mapping[str | None, Factory],
        tools: Sequence[Tool],
        tokenizer: PreTrainedTokenizerBase,
        config: AsyPPOConfig,
        eos_token_ids: Sequence[int],
        longest: int,
    ):
        """``factories``: what makes environments, by the column ``environment`` of a row, or by None for all rows; none
        where there are ``tools`` alone. ``longest`` is the tokens of a prompt and a response together that the sampler
        may be asked for. Raises ConfigError."""
        self.factories, self.tools = dict(factories), list(tools)
        self.tokenizer, self.config, self.longest = tokenizer, config, longest
        self.answer_tokens = AnswerTokens(tokenizer, eos_token_ids, config.data.chat_template_kwargs)
        self.pools: dict[str | None, list[Any]] = {}
        """Environments are made once and reset often, as in TRL."""
        self.examples: dict[str | None, Session] = {}
        """A session of each kind: what tools it has, and whether it gives rewards."""
        for name in [*self.factories] or [None]:
            self.pools[name] = [self._made(name)] if self.factories else []
            self.examples[name] = session(self.pools[name][0] if self.factories else None, self.tools)
            if not self.examples[name].text:
                self._check_template(list(self.examples[name].tools.values()))

    @property
    def reward_names(self) -> dict[str | None, str]:
        """What rewards of environments are called in metrics, by the name of a factory; those that give none left
        out."""
        given = self.config.environment.name
        return {
            name: str(name or (given if given and ":" not in given else type(one.environment).__name__))
            for name, one in self.examples.items()
            if one.text or hasattr(one.environment, "get_reward")
        }

    def _made(self, name: str | None) -> Any:
        try:
            return self.factories[name]()
        except Exception as error:  # whatever an environment raises when it is made
            given = self.config.environment
            raise ConfigError(
                f"environment: got {given.name or name or 'a factory'} with {given.params}, which cannot be made: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    def _check_template(self, tools: Sequence[Tool]) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "environment: got tools, but the tokenizer has no chat template, which shows them to the policy; needs "
                "one, or an environment with step, which reads text"
            )
        for tool in tools:
            try:
                get_json_schema(tool)
            except Exception as error:  # transformers' own, by what is missing, and inspect's
                why = " ".join(str(error).split())
                raise ConfigError(
                    f"environment: the tool {tool.__name__} cannot be shown to the policy: {why}"
                ) from error
        said = "what a tool has said"
        tokens = self.answer_tokens.of_messages([{"role": "tool", "name": tools[0].__name__, "content": said}], tools)
        if said not in self.tokenizer.decode(tokens):
            raise ConfigError("environment: got tools, but the chat template does not show what they answer")

    def __call__(self, sampler: Sampler, rows: Sequence[Row], temperature: float) -> list[Played]:
        """Play an episode for each row. Chance comes from torch's global generator, one number an episode, which seeds
        its environment. Each rank asks the environments of its own rows. Raises EnvironmentFailure, where one cannot
        begin, and ConfigError."""
        names = [self._name_of(row) for row in rows]
        seeds = torch.randint(2**31, (len(rows),)).tolist()
        keys = [row["prompt"] for row in rows]
        own: dict[int, Session] = {}

        def begin(part: slice) -> list[str]:
            own.update(self._sessions(names, part))
            # The column that names an environment is none of its own.
            given = rows[part] if None in self.examples else [_without(row, "environment") for row in rows[part]]
            return self._begun([own[i] for i in range(part.start, part.stop)], given, seeds[part])

        observations = divided(begin, keys)
        episodes = self._opened(rows, names, observations)
        ready = deque(self._waves(len(rows)))
        asked: deque[tuple[list[int], _Asked]] = deque()
        while ready or asked:
            if ready:
                going = ready.popleft()
            else:
                going, waited_for = asked.popleft()
                for i, answer in enumerate(divided(partial(self._answers, own, waited_for), keys)):
                    if answer is not None:
                        self._add_answer(episodes[i], names[i], answer)
                going = [i for i in going if not episodes[i].over]
            if going:
                self._sample(sampler, [episodes[i] for i in going], temperature)
                turns = {i: turn for i in going if (turn := self._turn(episodes[i], names[i])) is not None}
                here = {i: turn for i, turn in turns.items() if i in own}
                asked.append((going, _Asked(here, self._calls([partial(own[i].answer, here[i]) for i in here]))))
        given = divided(lambda part: self._rewards([own[i] for i in range(part.start, part.stop)], rows[part]), keys)
        return [
            self._played(episode, own.get(i), reward, names[i])
            for i, (episode, reward) in enumerate(zip(episodes, given, strict=True))
        ]

    def _name_of(self, row: Row) -> str | None:
        if None in self.examples:
            return None
        if not isinstance(name := row.get("environment"), str) or name not in self.examples:
            raise ConfigError(
                f"environment: got a row with the environment {name!r}, needs one of "
                f"{', '.join(map(str, self.examples))}"
            )
        return name

    def _sessions(self, names: Sequence[str | None], part: slice) -> dict[int, Session]:
        taken: dict[str | None, int] = {}
        found = {}
        for i in range(part.start, part.stop):
            environment, number = None, taken.get(names[i], 0)
            if self.factories:
                pool = self.pools[names[i]]
                if number == len(pool):
                    pool.append(self._made(names[i]))
                environment = pool[number]
            taken[names[i]] = number + 1
            found[i] = session(environment, self.tools)
        return found

    def _waves(self, count: int) -> list[list[int]]:
        """Divide episodes evenly, neighbours, such as those of a group, together."""
        waves = min(self.config.environment.waves, count)
        return [list(range(count * w // waves, count * (w + 1) // waves)) for w in range(waves)]

    def _calls(self, functions: Sequence[Callable[[], Any]]) -> Calls:
        return Calls(functions, self.config.environment.max_parallel, self.config.environment.timeout)

    def _begun(self, sessions: Sequence[Session], rows: Sequence[Row], seeds: Sequence[int]) -> list[str]:
        begun = [partial(one.begin, row, seed) for one, row, seed in zip(sessions, rows, seeds, strict=True)]
        outcomes = self._calls(begun).outcomes()
        for one, row, outcome in zip(sessions, rows, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise _failure(one, row, "reset", outcome)
        return outcomes

    def _opened(self, rows: Sequence[Row], names: Sequence[str | None], observations: Sequence[str]) -> list[_Open]:
        prompts = [_with(row["prompt"], observation) for row, observation in zip(rows, observations, strict=True)]
        tokens: list[list[int]] = [[] for _ in rows]
        for name, example in self.examples.items():
            chosen = [i for i, of in enumerate(names) if of == name]
            texts = [i for i in chosen if isinstance(prompts[i], str)]
            if texts and not example.text:
                raise ConfigError(
                    f"environment: got tools and a prompt that is text ({short(prompts[texts[0]])}), needs chat "
                    "messages, into which the chat template writes the tools"
                )
            tools = {} if example.text else {"tools": list(example.tools.values())}
            kwargs = self.config.data.chat_template_kwargs | tools
            for i, ids in zip(chosen, prompt_tokens([prompts[i] for i in chosen], self.tokenizer, kwargs), strict=True):
                tokens[i] = ids
        room = self.longest - self.config.max_completion_length
        for ids, prompt in zip(tokens, prompts, strict=True):
            if len(ids) > room:
                raise ConfigError(
                    f"environment: with its observation or tools a prompt has {len(ids)} tokens, needs at most {room} "
                    f"beside max_completion_length {self.config.max_completion_length} ({short(prompt_text(prompt))})"
                )
        return [_Open(ids, isinstance(row["prompt"], str)) for ids, row in zip(tokens, rows, strict=True)]

    def _sample(self, sampler: Sampler, episodes: Sequence[_Open], temperature: float) -> None:
        """Add a turn to each of ``episodes``. The sampler takes one limit a call: what lies past an episode's own is
        cut off, and those for which it would be too many tokens go by themselves."""
        most = self.config.environment.max_turn_length or math.inf
        left = [int(min(most, self.config.max_completion_length - len(one.tokens) - 1)) for one in episodes]
        waiting = sorted(range(len(episodes)), key=lambda i: -left[i])
        while waiting:
            limit = left[waiting[0]]
            fits = [len(episodes[i].prompt) + len(episodes[i].tokens) + limit <= self.longest for i in waiting]
            chosen = sorted(i for i, fit in zip(waiting, fits, strict=True) if fit)
            waiting = [i for i, fit in zip(waiting, fits, strict=True) if not fit]
            prompts = [torch.tensor(episodes[i].prompt + episodes[i].tokens) for i in chosen]
            drawn = sampler.sample(prompts, max_completion_length=limit, temperature=temperature)
            for i, response in zip(chosen, drawn, strict=True):
                episodes[i].add(response.tokens[: left[i]].tolist(), response.logprob[: left[i]].tolist())
                episodes[i].truncated = response.truncated or len(response.tokens) > left[i]

    def _turn(self, episode: _Open, name: str | None) -> Message | None:
        """Take note of the turn that was sampled, and return it as a message; None where nobody is to answer it, since
        it was cut off or calls no tool, and the episode is over."""
        start, end = (episode.turns[-1].until if episode.turns else 0), len(episode.tokens)
        tokens, example = episode.tokens[start:end], self.examples[name]
        if example.text:
            turn: Message = {
                "role": "assistant",
                "content": self.tokenizer.decode(tokens, skip_special_tokens=True),
            }
        else:
            before = episode.prompt + episode.tokens[:start]
            turn = parsed_turn(self.tokenizer, tokens, before, list(example.tools.values()))
        calls = [dict(call["function"]) for call in turn.get("tool_calls", [])]
        episode.messages.append(turn)
        episode.turns.append(Turn(start, end, end, turn["content"], calls, None, 0.0, 0, False))
        episode.over = episode.truncated or not (example.text or calls)
        return None if episode.over else turn

    def _answers(self, own: Mapping[int, Session], asked: _Asked, part: slice) -> list[Answer | None]:
        answers: dict[int, Answer] = {}
        for (i, turn), answer in zip(asked.turns.items(), asked.calls.outcomes(), strict=True):
            if isinstance(answer, TimedOut):
                self._drop(own[i])
                assert self.config.environment.timeout is not None
                answers[i] = own[i].timed_out(turn, self.config.environment.timeout)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                answers[i] = answer
        return [answers.get(i) for i in range(part.start, part.stop)]

    def _drop(self, one: Session) -> None:
        """Use an environment no more: a call of it may still run."""
        for pool in self.pools.values():
            pool[:] = [other for other in pool if other is not one.environment]

    def _add_answer(self, episode: _Open, name: str | None, answer: Answer) -> None:
        turn, config = episode.turns[-1], self.config
        if episode.text:
            tokens = self.answer_tokens.of_text(answer.text)
        else:
            tokens = self.answer_tokens.of_messages(answer.messages, list(self.examples[name].tools.values()))
        tokens = tokens[: config.max_completion_length - len(episode.tokens)]
        episode.add(tokens)
        episode.reward[turn.end - 1] += answer.reward
        episode.messages += answer.messages
        episode.failures += answer.failures
        episode.timeouts += answer.timed_out
        episode.turns[-1] = Turn(
            turn.start,
            turn.end,
            len(episode.tokens),
            turn.action,
            turn.calls,
            answer.text,
            answer.reward,
            answer.failures,
            answer.timed_out,
        )
        episode.over = answer.done
        full = len(episode.tokens) + 2 > config.max_completion_length
        if not answer.done and (full or len(episode.turns) == config.environment.max_turns):
            episode.stop()

    def _rewards(self, sessions: Sequence[Session], rows: Sequence[Row]) -> list[Any]:
        """What ``get_reward`` gives, where there is one; None where it has none, or was not over in time."""
        scored = [i for i, one in enumerate(sessions) if hasattr(one.environment, "get_reward") and not one.lost]
        given: list[Any] = [None] * len(sessions)
        for i, reward in zip(scored, self._calls([sessions[i].reward for i in scored]).outcomes(), strict=True):
            if isinstance(reward, TimedOut):
                self._drop(sessions[i])
                continue
            if isinstance(reward, BaseException):
                raise _failure(sessions[i], rows[i], "get_reward", reward)
            given[i] = number(reward)
            if reward is not None and given[i] is None:
                fault = TypeError(f"returned {short(reward)}, needs a finite number, or None")
                raise _failure(sessions[i], rows[i], "get_reward", fault)
        return given

    def _played(self, episode: _Open, own: Session | None, at_the_end: float | None, name: str | None) -> Played:
        reward = torch.tensor(episode.reward)
        if at_the_end is not None:
            reward[episode.turns[-1].end - 1] += at_the_end
        response = Episode(
            torch.tensor(episode.tokens),
            torch.tensor(episode.logprob),
            episode.truncated,
            torch.tensor(episode.policy),
            reward,
            episode.turns,
            episode.failures,
            episode.timeouts,
        )
        text = self.tokenizer.decode(episode.tokens, skip_special_tokens=True) if episode.text else None
        total = float(reward.sum()) if self.examples[name].text or at_the_end is not None else None
        return Played(
            torch.tensor(episode.prompt),
            response,
            episode.messages if text is None else text,
            None if own is None else own.environment,
            total,
        )


def _with(prompt: Prompt, observation: str) -> Prompt:
    """``prompt`` with the first observation behind it: in chat messages behind the last one's content, as in TRL."""
    if not observation:
        return prompt
    if isinstance(prompt, str):
        return prompt + observation
    content = prompt[-1].get("content") or ""
    joined = content + observation if isinstance(content, str) else [*content, {"type": "text", "text": observation}]
    return [*prompt[:-1], {**prompt[-1], "content": joined}]


def _without(row: Row, column: str) -> Row:
    return {name: value for name, value in row.items() if name != column}


def _failure(one: Session, row: Row, method: str, error: BaseException) -> EnvironmentFailure:
    made = EnvironmentFailure(
        f"environment {type(one.environment).__name__}: {method} failed for the row "
        f"{short(prompt_text(row['prompt']))}: {type(error).__name__}: {' '.join(str(error).split())}"
    )
    made.__cause__ = error
    return made


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return metrics of what environments did; calls of tools under TRL's names."""
    count, turns = len(episodes), [len(one.turns) for one in episodes]
    calls = sum(len(turn.calls) for one in episodes for turn in one.turns)
    answered = sum(turn.observation is not None for one in episodes for turn in one.turns)
    failures, timeouts = (sum(getattr(one, name) for one in episodes) for name in ("failures", "timeouts"))
    row = {
        "environment/turns/mean": sum(turns) / count,
        "environment/turns/max": float(max(turns)),
        "environment/tokens/mean": float(sum(int((~one.policy).sum()) for one in episodes)) / count,
        "environment/failures": float(failures),
        "environment/timeouts": float(timeouts),
        "environment/answers": float(answered),
    }
    if calls:
        row |= {"tools/call_frequency": calls / count, "tools/failure_frequency": failures / calls}
    return row
