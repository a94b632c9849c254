"""A prompt: text, or chat messages; what is wrong with one, and its tokens as the model sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asyppo.config import ConfigError
from asyppo.data.rows import Row, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]
"""Text, or chat messages: ``[{"role": …, "content": …}, …]``. A content is text, a list of blocks of text, or, beside
``tool_calls``, None."""


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text to read; of chat messages, role and content."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {content_text(message.get('content'))}" for message in prompt)


def content_text(content: Any) -> str:
    """Return a message's content as text; blocks stand on lines of their own, as vLLM has it."""
    if isinstance(content, (list, tuple)):
        return "\n".join(str(block["text"]) for block in content)
    return "" if content is None else str(content)


def prompt_tokens(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Return the tokens of each prompt as the model sees it. Raises ConfigError if the tokenizer has no chat template.

    Text is tokenized as the tokenizer does by default, with its beginning-of-sequence token if it adds one, but without
    what it adds at the end: a response goes on from there. Chat messages go through the chat template, which writes
    such tokens itself, up to where the assistant's answer begins; where the last message is the assistant's, the answer
    has begun, and it goes on from the end of that message (as in TRL).
    """
    _, end = added_tokens(tokenizer)
    texts = prompt_texts(prompts, tokenizer, chat_template_kwargs)
    tokens: list[list[int]] = [[] for _ in prompts]
    for is_text in (True, False):
        chosen = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str) is is_text]
        for i, ids in zip(chosen, _ids([texts[i] for i in chosen], tokenizer, is_text), strict=True):
            tokens[i] = ids[: -len(end)] if is_text and end and ids[-len(end) :] == end else ids
    return tokens


def prompt_texts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the text of each prompt that is tokenized: chat messages as the chat template has them. Raises ConfigError
    if there is none."""
    begin, _ = added_tokens(tokenizer)
    # Text that a template was already applied to begins with the token that the tokenizer would add.
    bos = tokenizer.bos_token if tokenizer.bos_token_id in begin[:1] else ""
    texts = [prompt.removeprefix(bos) if isinstance(prompt, str) else "" for prompt in prompts]
    chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if chats:
        rendered = _rendered([prompts[i] for i in chats], tokenizer, chat_template_kwargs or {})
        for i, text in zip(chats, rendered, strict=True):
            texts[i] = text
    return texts


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        list(texts),
        padding=False,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # what is too long for the model is said elsewhere
    )["input_ids"]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer adds before a text, and those that it adds behind it."""
    content, whole = (_ids(["a"], tokenizer, add)[0] for add in (False, True))
    for start in range(len(whole) - len(content) + 1):
        if content and whole[start : start + len(content)] == content:
            return whole[:start], whole[start + len(content) :]
    begin = whole[: whole[:1] == [tokenizer.bos_token_id]]
    return begin, whole[-1:] if whole[len(begin) :][-1:] == [tokenizer.eos_token_id] else []


def _rendered(
    prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> list[str]:
    if not tokenizer.chat_template:
        raise ConfigError(
            "data: prompts are chat messages, but the tokenizer has no chat template; needs text prompts, or the "
            "tokenizer of a chat model"
        )
    texts = [""] * len(prompts)
    for begun in (False, True):  # whether the assistant's answer is
        chosen = [i for i, prompt in enumerate(prompts) if (prompt[-1]["role"] == "assistant") is begun]
        if chosen:
            rendered = tokenizer.apply_chat_template(
                [messages_for_template(prompts[i], str(tokenizer.chat_template)) for i in chosen],
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                **chat_template_kwargs,
            )
            for i, text in zip(chosen, rendered, strict=True):
                texts[i] = text
    return texts


_ASKS_FOR_NONE = re.compile(r"content(['\"]\])?\s+is\s+(not\s+)?none")


def messages_for_template(prompt: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return chat messages as templates take them: without keys that are None, as tables have them for what is not
    there, and with contents of text. The content None beside tool calls is empty text, but for a template that asks
    whether a content is None."""
    messages = []
    for message in prompt:
        made = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        made["content"] = None if content is None and _ASKS_FOR_NONE.search(template) else content_text(content)
        messages.append(made)
    return messages


def prompt_key(prompt: Prompt) -> str:
    """Return what is the same for prompts that are the same, whatever blanks are around them."""
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def prompt_fault(row: Row) -> str | None:
    """Say what is wrong with the prompt of ``row``, or None."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            return f"prompt: got {short(prompt)}, needs text"
        return _half_pair("prompt:", prompt)
    if "prompt" not in row:
        names = ", ".join(map(str, row)) or "nothing"
        return f"no column 'prompt', only {short_text(names)}; data.columns gives others that name"
    if not isinstance(prompt, list):
        return f"prompt: got {short(prompt)}, needs text or a list of chat messages"
    if not prompt:
        return "prompt: got no chat message, needs at least one"
    for number, message in enumerate(prompt, 1):
        fault = _message_fault(message)
        if fault is not None:
            return f"prompt: message {number} {fault}"
    return None


def short_text(text: str) -> str:
    """Return ``text`` on one line and, where it is long, cut; halves of surrogate pairs are escaped."""
    text = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:197]}..."


def _message_fault(message: Any) -> str | None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return f"is {short(message)}, needs a role and a content, both text"
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, (list, tuple)):
        for block in content:
            if not isinstance(block, Mapping) or not isinstance(block.get("text"), str):
                kind = block.get("type") if isinstance(block, Mapping) else None
                what = f"a block of type {kind!r}" if isinstance(kind, str) else f"the block {short(block)}"
                return f"has {what} in its content, needs blocks of text: the models here read nothing else"
        content = content_text(content)
    if not isinstance(content, str):
        return f"is {short(message)}, needs a role and a content, both text"
    for text in (message["role"], content):
        fault = _half_pair("is no text:", text)
        if fault is not None:
            return fault
    return None


def _half_pair(what: str, text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return f"{what} half a surrogate pair, {half!r}, at character {error.start + 1}, needs the whole character"
    return None
