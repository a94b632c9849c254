"""The tokenizer of a model, and the special tokens that matter."""

from __future__ import annotations

import logging

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from asyppo.config import ConfigError

log = logging.getLogger("asyppo")


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Raises ConfigError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"policy.model_name_or_path: {path!r} has no tokenizer: {' '.join(str(error).split())}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one up
        raise ConfigError(f"policy.model_name_or_path: {path!r} has no tokenizer, needs one beside the model")
    return tokenizer


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a response: the generation config's, the tokenizer's, and the one by which the chat
    template ends a turn. Raises ConfigError if there is none, and no padding token either."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, (list, tuple)) else [configured]) | {tokenizer.eos_token_id}
    ids.discard(None)
    turn_end = turn_end_id(tokenizer)
    if not ids and tokenizer.pad_token_id is None:
        hint = (
            ""
            if turn_end is None
            else f" ({tokenizer.convert_ids_to_tokens(turn_end)!r}, as its chat template has it?)"
        )
        raise ConfigError(
            "policy.model_name_or_path: its tokenizer has no end-of-sequence token and no padding token, so it is not "
            f"known where a response ends; needs eos_token in tokenizer_config.json{hint}, or eos_token_id in "
            "generation_config.json"
        )
    if not ids and turn_end is None:
        log.warning("the tokenizer has no end-of-sequence token: every response is cut off at max_completion_length")
    return sorted(ids | ({turn_end} if turn_end is not None else set()))


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token by which the chat template ends an assistant's turn, ``<|im_end|>`` for example, which
    in a base model's tokenizer is not the end-of-sequence token; None if there is none, with a warning if the turn then
    ends with text."""
    if not tokenizer.chat_template:
        return None
    answer = "The answer."
    turn = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # a template of its own kind, which rows of its kind go through
        log.warning("the chat template takes no turn of user and assistant: where one ends is not known")
        return None
    _, found, rest = text.rpartition(answer)
    added = tokenizer.added_tokens_decoder
    for token in tokenizer(rest, add_special_tokens=False)["input_ids"] if found and rest.strip() else []:
        if token in tokenizer.all_special_ids or (token in added and added[token].content.strip()):
            return token
    if found and rest:
        log.warning("the chat template ends a turn with %r, which is no special token: responses go on after it", rest)
    return None


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token, or the end-of-sequence token, or else 0; lengths say what is padding."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
