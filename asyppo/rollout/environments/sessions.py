"""One episode of an environment: of the text protocol, or in TRL's form, whose public methods are tools."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyppo.config import ConfigError
from asyppo.environments.protocol import FAULTS, error_text, readable, reset, step
from asyppo.rollout.environments.chat import Message

Tool = Callable[..., Any]


@dataclass
class Answer:
    """What an environment says to a turn."""

    messages: list[Message]
    """Of the role ``user``, or one of the role ``tool`` for each call."""
    reward: float = 0.0
    done: bool = False
    failures: int = 0
    """Calls that raised, or returned nothing that can be shown."""
    timed_out: bool = False

    @property
    def text(self) -> str:
        """What was observed."""
        return "\n".join(message["content"] for message in self.messages)


@dataclass
class Session:
    """One episode. ``environment`` is None where there are tools alone."""

    environment: Any
    tools: dict[str, Tool] = field(default_factory=dict)
    """By name; empty in the text protocol."""
    lost: bool = False
    """A call of the environment's has not come back in time, and may still run."""

    @property
    def text(self) -> bool:
        """Whether it is of the text protocol."""
        return not self.tools

    def begin(self, row: Mapping[str, Any], seed: int) -> str:
        """Return the first observation, which stands behind the prompt. Raises what ``reset`` raises."""
        return "" if self.environment is None else reset(self.environment, row, seed)

    def answer(self, turn: Message) -> Answer:
        """Return the answer to a turn, whatever the environment or a tool does."""
        if self.text:
            found = step(self.environment, turn["content"])
            said = [{"role": "user", "content": found.observation}]
            return Answer(said, found.reward, found.done, int(found.failed))
        answer = Answer([])
        for call in turn["tool_calls"]:
            name = call["function"]["name"]
            try:
                content = readable(str(self._called(name, call["function"]["arguments"])))
            except FAULTS as error:
                answer.failures += 1
                content = error_text(str(error) or type(error).__name__)
            answer.messages.append({"role": "tool", "name": name, "content": content})
        return answer

    def _called(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if name not in self.tools:
            raise ValueError(f"there is no tool {name!r}, only {', '.join(self.tools)}")
        made = self.tools[name](**arguments)
        return asyncio.run(made) if inspect.iscoroutine(made) else made

    def timed_out(self, turn: Message, timeout: float) -> Answer:
        """Return what stands for an answer that has not come. An environment whose call has not come back is not called
        again: its episode is over."""
        content = error_text(f"no answer within {timeout:g} s")
        names = [call["function"]["name"] for call in turn.get("tool_calls", [])]
        said = [{"role": "tool", "name": name, "content": content} for name in names]
        over = self.lost = self.environment is not None
        return Answer(said or [{"role": "user", "content": content}], done=over, timed_out=True)

    def reward(self) -> Any:
        """Return what the environment's ``get_reward`` gives the whole episode. Raises what it raises."""
        made = self.environment.get_reward()
        return asyncio.run(made) if inspect.iscoroutine(made) else made


def public_methods(environment: Any) -> list[str]:
    """Return the names of the methods that TRL takes for tools, listed by the class."""
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    return [name for name, _ in members if name not in ("reset", "get_reward") and not name.startswith("_")]


def session(environment: Any, tools: Sequence[Tool]) -> Session:
    """Return a session of ``environment`` (None: of ``tools`` alone). One that has ``step`` is of the text protocol.
    Raises ConfigError."""
    if environment is None:
        return Session(None, {tool.__name__: tool for tool in tools})
    if not callable(getattr(environment, "reset", None)):
        raise ConfigError(f"environment: {type(environment).__name__} has no method reset, needs one")
    if callable(getattr(environment, "step", None)):
        if tools:
            raise ConfigError(
                f"environment.tools: got {len(tools)}, needs none beside {type(environment).__name__}, which has step: "
                "it reads the text of a turn"
            )
        return Session(environment)
    methods = [getattr(environment, name) for name in public_methods(environment)]
    found = {tool.__name__: tool for tool in [*tools, *methods]}
    if not found:
        raise ConfigError(
            f"environment: {type(environment).__name__} has no step and no public method, needs one: text is answered "
            "by step, and methods are tools"
        )
    return Session(environment, found)
