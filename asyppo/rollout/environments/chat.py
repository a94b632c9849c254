"""How an environment's answer stands in a sequence, and which tools a turn calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from asyppo.config import ConfigError

Message = dict[str, Any]

MARK = "the-turn-that-stands-in-4e1d0b"  # in no docstring of a tool, which templates write before it
TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class AnswerTokens:
    """Tokens of answers, which stand right behind the end-of-sequence token of a turn.

    A turn stays as it was sampled: what the chat template writes between it and the next is taken from a conversation
    that stands in for the real one, from the end of its assistant's turn on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        chat_template_kwargs: Mapping[str, Any],
    ):
        self.tokenizer, self.kwargs = tokenizer, dict(chat_template_kwargs)
        self.ends = [tokenizer.convert_ids_to_tokens(token) for token in eos_token_ids]
        self.end = tokenizer.eos_token_id if tokenizer.eos_token_id in eos_token_ids else eos_token_ids[0]

    def of_text(self, observation: str) -> list[int]:
        """Return the tokens of an answer to a text prompt: its own, or, where it is empty, an end-of-sequence token."""
        return self.tokenizer(observation, add_special_tokens=False)["input_ids"] or [self.end]

    def of_messages(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Return the tokens of messages of a tool or a user, and of what begins the next turn. Raises ConfigError."""
        turn: Message = {"role": "assistant", "content": MARK}
        if messages[0]["role"] == "tool":
            call = {"name": messages[0]["name"], "arguments": {"of": MARK}}
            turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        given = {"tools": list(tools)} if tools else {}
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}, turn, *messages],
                tokenize=False,
                add_generation_prompt=True,
                **given,
                **self.kwargs,
            )
        except Exception as error:  # whatever a template raises
            raise ConfigError(
                f"environment: the chat template does not take an answer of the role {messages[0]['role']!r}: "
                f"{' '.join(str(error).split())}"
            ) from error
        _, found, rest = text.partition(MARK)
        places = [(rest.index(end), len(end)) for end in self.ends if end in rest]
        if not found or not places:
            raise ConfigError(
                "environment: the chat template does not end an assistant's turn, or one that calls a tool, with an "
                f"end-of-sequence token ({', '.join(self.ends)}), needs one that does"
            )
        place, length = min(places)
        return self.tokenizer(rest[place + length :], add_special_tokens=False)["input_ids"]


def parsed_turn(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], before: Sequence[int], tools: Sequence[Any]
) -> Message:
    """Return a turn as a message, with the ``tool_calls`` it makes, if any: by the tokenizer's ``response_template``
    (transformers' ``parse_response``), or else as ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``. One whose
    calls are malformed calls nothing, as in TRL. ``before`` is the tokens that the turn follows."""
    plain: Message = {"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)}
    if getattr(tokenizer, "response_template", None) is None:
        calls = [_call(text) for text in TOOL_CALL.findall(tokenizer.decode(tokens))]
        content = TOOL_CALL.sub("", plain["content"]).strip()
    else:
        try:
            parsed = tokenizer.parse_response(list(tokens), prefix=list(before), tools=list(tools))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return plain
        calls = [_checked(call.get("function")) for call in (parsed or {}).get("tool_calls") or []]
        content = (parsed or {}).get("content") or ""
        if not calls:
            return plain
    found = [call for call in calls if call is not None]
    if not calls or len(found) < len(calls):
        return plain
    made = [{"type": "function", "function": call} for call in found]
    return {"role": "assistant", "content": content, "tool_calls": made}


def _call(text: str) -> Message | None:
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError):  # numbers of thousands of digits, too, and brackets in brackets
        return None


def _checked(call: Any) -> Message | None:
    """A call's name and arguments; None where it is no call."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, dict) else None
